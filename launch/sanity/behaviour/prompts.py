"""The prompts that the server makes of messages and tools, against the tokens that were trained on."""

import re
from collections.abc import Callable, Sequence

from launch.checks import Check, judged
from launch.sanity.behaviour.turns import Answer, Turn, spread
from launch.serving.client import Client

_SHOWN = 8  # tokens of a difference
_TOKENIZED = 16  # turns that /tokenize is asked for
# What OpenAI's schema knows and a data set's tools need not have: servers fill it in.
_SCHEMA_KEYS = re.compile(r'"(defer_loading|description|strict|parameters)": ?(?:null|false)')
_ESCAPED = re.compile(r"\\u[0-9a-f]{4}")
_BY_TOKENS = (
    "make the prompt's tokens on the client, with the base's tokenizer.apply_chat_template(messages, tools=tools, "
    "add_generation_prompt=True), and send them as input_ids to /generate"
)


def parity(
    client: Client, asked: Sequence[Turn], answers: Sequence[Answer], decode: Callable[[list[int]], str]
) -> Check:
    """Of every answer's prompt, and of some of the turns asked by /tokenize. The first difference is shown decoded, with its cause and
    what a client can do about it where the cause is a known one."""
    pairs = [(a.turn, a.prompt) for a in answers]
    pairs += [(turn, _tokenized(client, turn)) for turn in spread(asked, _TOKENIZED)]
    differing = [(turn, theirs) for turn, theirs in pairs if theirs != turn.prompt]
    detail = _difference(*differing[0], decode) if differing else ""
    return Check(
        "chat template", "prompts at inference that differ from the training text",
        f"{len(pairs) - len(differing)} of {len(pairs)} prompts equal", "all", judged(not differing), detail,
    )  # fmt: skip


def _tokenized(client: Client, turn: Turn) -> list[int]:
    asked = {k: v for k, v in turn.request(1, {}).items() if k in ("model", "messages", "tools")}
    return list(client.post("/tokenize", asked)["tokens"])


def _difference(turn: Turn, theirs: list[int], decode: Callable[[list[int]], str]) -> str:
    mine = turn.prompt
    at = next((i for i, (x, y) in enumerate(zip(mine, theirs, strict=False)) if x != y), min(len(mine), len(theirs)))
    what = (
        f"{turn}, token {at}: trained on {decode(mine[at : at + _SHOWN])!r} ({len(mine)} tokens), the server sends "
        f"{decode(theirs[at : at + _SHOWN])!r} ({len(theirs)} tokens)"
    )
    return f"{what}. {cause(decode(mine), decode(theirs))}"


def cause(mine: str, theirs: str) -> str:
    """What is known to make a server's prompt another text than the training's, and what to do about it."""
    extra = set(_SCHEMA_KEYS.findall(theirs)) - set(_SCHEMA_KEYS.findall(mine))
    if extra:
        return (
            f"The server writes {', '.join(sorted(extra))} into tools that do not have it: give every tool of the data and of the "
            f"client that key, or {_BY_TOKENS}"
        )
    for one, other, switch in ((theirs, mine, "true"), (mine, theirs, "false")):
        if "think>" in one.removeprefix(other) and one.startswith(other):
            return f'Thinking is switched otherwise: send "chat_template_kwargs": {{"enable_thinking": {switch}}}'
    if theirs.endswith(mine):
        return f"The server puts {theirs.removesuffix(mine)!r} before every prompt: set add_bos_token=false in tokenizer_config.json"
    if len(_ESCAPED.findall(theirs)) != len(_ESCAPED.findall(mine)):
        return f"JSON is written with other escapes: {_BY_TOKENS}"
    return f"The cause is none of the known ones: compare chat_template.jinja with the base's, or {_BY_TOKENS}"
