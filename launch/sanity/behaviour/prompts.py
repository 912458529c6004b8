"""Comparison of the prompts that the server renders from messages and tools with the tokens that were trained on."""

import re
from collections.abc import Callable, Sequence

from launch.checks import Check, judged
from launch.sanity.behaviour.turns import Answer, Turn, spread
from launch.serving.client import Client

_SHOWN = 8  # tokens shown of a difference
_TOKENIZED = 16  # turns that are sent to /tokenize
# Keys of OpenAI's tool schema that a data set's tools may lack: servers add them.
_SCHEMA_KEYS = re.compile(r'"(defer_loading|description|strict|parameters)": ?(?:null|false)')
_ESCAPED = re.compile(r"\\u[0-9a-f]{4}")
_BY_TOKENS = (
    "make the prompt's tokens on the client, with the base's tokenizer.apply_chat_template(messages, tools=tools, "
    "add_generation_prompt=True), and send them as input_ids to /generate"
)


def parity(
    client: Client, asked: Sequence[Turn], answers: Sequence[Answer], decode: Callable[[list[int]], str]
) -> Check:
    """Check that the server's prompts equal the trained ones: those of all answers, and of some turns through /tokenize.

    The first difference is shown decoded. If its cause is known, the cause and its fix are shown too.
    """
    pairs = [(a.turn, a.prompt) for a in answers]
    pairs += [(turn, _tokenized(client, turn)) for turn in spread(asked, _TOKENIZED)]
    differing = [(turn, served) for turn, served in pairs if served != turn.prompt]
    detail = _difference(*differing[0], decode) if differing else ""
    return Check(
        "chat template", "prompts at inference that differ from the training text",
        f"{len(pairs) - len(differing)} of {len(pairs)} prompts equal", "all", judged(not differing), detail,
    )  # fmt: skip


def _tokenized(client: Client, turn: Turn) -> list[int]:
    asked = {k: v for k, v in turn.request(1, {}).items() if k in ("model", "messages", "tools")}
    return list(client.post("/tokenize", asked)["tokens"])


def _difference(turn: Turn, served: list[int], decode: Callable[[list[int]], str]) -> str:
    trained = turn.prompt
    pairs = enumerate(zip(trained, served, strict=False))
    at = next((i for i, (x, y) in pairs if x != y), min(len(trained), len(served)))
    what = (
        f"{turn}, token {at}: trained on {decode(trained[at : at + _SHOWN])!r} ({len(trained)} tokens), the server sends "
        f"{decode(served[at : at + _SHOWN])!r} ({len(served)} tokens)"
    )
    return f"{what}. {cause(decode(trained), decode(served))}"


def cause(trained: str, served: str) -> str:
    """Return the known cause, with its fix, of a difference between the trained prompt and the server's prompt."""
    extra = set(_SCHEMA_KEYS.findall(served)) - set(_SCHEMA_KEYS.findall(trained))
    if extra:
        return (
            f"The server writes {', '.join(sorted(extra))} into tools that do not have it: give every tool of the data and of the "
            f"client that key, or {_BY_TOKENS}"
        )
    for longer, shorter, switch in ((served, trained, "true"), (trained, served, "false")):
        if "think>" in longer.removeprefix(shorter) and longer.startswith(shorter):
            return f'Thinking is switched differently: send "chat_template_kwargs": {{"enable_thinking": {switch}}}'
    if served.endswith(trained):
        added = served.removesuffix(trained)
        return f"The server puts {added!r} before every prompt: set add_bos_token=false in tokenizer_config.json"
    if len(_ESCAPED.findall(served)) != len(_ESCAPED.findall(trained)):
        return f"JSON is written with other escapes: {_BY_TOKENS}"
    return f"The cause is none of the known ones: compare chat_template.jinja with the base's, or {_BY_TOKENS}"
