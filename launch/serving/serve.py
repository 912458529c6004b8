"""`make serve`: an export served by SGLang until Ctrl-C, with requests to copy that were tried before they are shown."""

import json
import shlex
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

PORT = 30_000  # SGLang's own
_PATH = "/v1/chat/completions"
_MAX_TOKENS = 512  # of the example's answer

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
    """Starts SGLang with the export's flags on loopback, at `sanity.port`, and stays until it is interrupted or SGLang ends.

    Raises `KeyboardInterrupt` once all of its processes are gone, and `SanityError` where it ended by itself.
    """
    if recipe.sanity.url is not None:
        raise ConfigError(
            f"sanity.url={recipe.sanity.url} is up already, and serve starts a server", "leave out sanity.url"
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
            console.print(f"{shown}\n\nup at {server.url}; Ctrl-C ends it")
            server.wait()
    except KeyboardInterrupt:
        raise KeyboardInterrupt("SGLang is ended.") from None


def thinks(folder: Path) -> bool:
    """Whether the run's data has thinking; what other models were trained on is not known, and published ones think."""
    run = folder.parent
    return not (run / "plan.json").is_file() or run_plan.of_run(run).data.thinks


def _port() -> int:
    """SGLang's own where it is free."""
    try:
        return free_port(PORT)
    except PreflightError:
        return free_port(None)


def examples(client: Client) -> str:
    """The same request by curl and by OpenAI's client, with what the server just answered to it.

    SGLang's reasoning parsers take every word of a model that does not think for its reasoning, and leave `content` empty:
    where the answer has no thinking in it the request says that it is not to be separated.
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
    """The sample's first trajectory: its tools and all up to the first answer."""
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
