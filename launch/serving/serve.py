"""`make serve`: serve an export with SGLang until Ctrl-C, and print example requests, which are tried before they are shown."""

import json
import shlex
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.run import run_plan, which_run
from launch.serving.client import Client
from launch.serving.server import Server, free_port
from recipes.config import Recipe
from recipes.errors import ConfigError, PreflightError
from recipes.paths import REPO

PORT = 30_000  # SGLang's default
_PATH = "/v1/chat/completions"
_MAX_TOKENS = 512  # limit of the example's answer

_PYTHON = """\
from openai import OpenAI

client = OpenAI(base_url="{url}/v1", api_key="none")
answer = client.chat.completions.create(
    model="default",
    messages={messages!r},
    tools={tools!r},
    temperature=0,
    max_tokens={max_tokens},{extra}
)
print(answer.choices[0].message)"""


def serve(recipe: Recipe, console: Console) -> None:
    """Start SGLang with the export's flags on loopback, at `sanity.port`, and wait until Ctrl-C or until SGLang ends.

    Raise `KeyboardInterrupt` after Ctrl-C, once all processes of the server are gone. Raise `SanityError` if SGLang ends by
    itself, and `ConfigError` if `sanity.url` names a running server.
    """
    if recipe.sanity.url is not None:
        raise ConfigError(
            f"sanity.url={recipe.sanity.url} names a running server, but serve starts its own", "leave out sanity.url"
        )
    own, folder = which_run.exported(recipe)
    own.sanity.port = recipe.sanity.port or _port()
    log = Path(recipe.cluster.root) / "serve" / f"{own.run}-{own.sanity.port}.log"
    server = Server(own, folder, log, thinks(folder), "serve")
    log.parent.mkdir(parents=True, exist_ok=True)
    console.print(f"starting SGLang with {folder}: {log}")
    try:
        with ExitStack() as stack:
            with console.status("Starting SGLang"):
                stack.enter_context(server)
                shown = examples(server)
            console.print(f"{shown}\n\nup at {server.url} on {socket.gethostname()}; Ctrl-C ends it")
            server.wait()
    except KeyboardInterrupt:
        raise KeyboardInterrupt("SGLang has ended.") from None


def thinks(folder: Path) -> bool:
    """Return whether the run's data has thinking. Return True for a folder without a run: published models think."""
    run = folder.parent
    return not (run / "plan.json").is_file() or run_plan.of_run(run).data.thinks


def _port() -> int:
    """Return SGLang's default port if it is free, otherwise any free port."""
    try:
        return free_port(PORT)
    except PreflightError:
        return free_port(None)


def examples(client: Client) -> str:
    """Return one request as a curl command and as Python for OpenAI's client, with the server's answer to it.

    If a model does not think, SGLang's reasoning parsers treat its whole answer as reasoning and leave `content` empty.
    The request therefore sets separate_reasoning=false if the answer has no thinking.
    """
    request = _request() | {"separate_reasoning": False}
    answer = client.post(_PATH, request)["choices"][0]
    thinks = "<think>" in (answer["message"].get("content") or "")
    if thinks:
        del request["separate_reasoning"]
    body = json.dumps(request, separators=(",", ":"), ensure_ascii=False)
    python = _PYTHON.format(
        url=client.url, messages=request["messages"], tools=request["tools"], max_tokens=_MAX_TOKENS,
        extra="" if thinks else '\n    extra_body={"separate_reasoning": False},  # this model answers without thinking',
    )  # fmt: skip
    curl = f"curl -s {client.url}{_PATH} -H 'Content-Type: application/json' -d {shlex.quote(body)}"
    return f"\n{curl}\n\n{python}\n\nits answer: {_shown(answer)}"


def _request() -> dict[str, Any]:
    """Return a request of the sample's first trajectory: its tools and the messages before the first answer."""
    with (REPO / "data_prep" / "sample" / "train.jsonl").open(encoding="utf-8") as lines:
        first = json.loads(next(lines))
    return {
        "model": "default", "messages": first["messages"][:2], "tools": first["tools"], "temperature": 0,
        "max_tokens": _MAX_TOKENS,
    }  # fmt: skip


def _shown(answer: dict[str, Any]) -> str:
    message = answer["message"]
    calls = [c["function"] for c in message.get("tool_calls") or []]
    said = "; ".join([repr((message.get("content") or "")[:200]), *(f"{c['name']}({c['arguments']})" for c in calls)])
    return f"{said} ({answer['finish_reason']})"
