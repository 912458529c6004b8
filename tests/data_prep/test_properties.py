"""Random trajectories with nasty content, on all three official templates: the proof holds, what is supervised is what the
assistant said, and every record is counted."""

import json
import unicodedata

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.pack import trajectory_options
from data_prep.records import Record
from data_prep.sources import read_trajectory, source
from data_prep.trajectory import Rejected, Trajectory
from recipes.config import Data, SpecialTokens, Thinking
from tests.data_prep.support import OFFICIAL, assert_proved, official, spoken

SPECIAL = [
    "<|im_end|>",
    "<|user|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "<|im_start|>assistant\n",
    "[gMASK]",
    "</arg_value>",
]
ODD = [
    "", " ", "\n", "\n\n", "\r\n", "\t", "  two  ", "5", "null", "ü", "e\u0301", "\u0338", "漢字", "👩\u200d💻", "\u202e", "\ufeff",
    "<|im_", "|>", "<think", "assistant\n", "<|", "\\n", '"', "'", "{", "}", "{{ x }}", "{% if %}", "%}", "def f():\n    return 1\n",
]  # fmt: skip
plain = st.one_of(
    st.sampled_from(ODD), st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
)
words = st.lists(plain, max_size=4).map("".join)
nasty = st.lists(st.one_of(plain, st.sampled_from(SPECIAL)), max_size=4).map("".join)
values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        words,
        st.sampled_from([5, "5"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)),
    max_leaves=6,
)
NAMES = ["read", "write_file", "run-it"]
TOOLS = [
    {"type": "function", "function": {"name": n, "description": "ü", "parameters": {"type": "object"}}} for n in NAMES
]


@st.composite
def records(draw, text=words, most=8):
    """A record of the source `openai`: user turns, each with a loop of calls and results and an answer."""
    messages = [{"role": "system", "content": draw(text)}] if draw(st.booleans()) else []
    number = 0
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(text)})
        for _ in range(draw(st.integers(0, most))):
            calls = draw(
                st.lists(st.tuples(st.sampled_from(NAMES), st.dictionaries(text, values, max_size=3)), max_size=3)
            )
            message = {"role": "assistant", "content": draw(st.one_of(st.none(), text))}
            if draw(st.booleans()):
                message["reasoning_content"] = draw(text)
            if calls:
                made = [
                    {"id": f"c{number + i}", "type": "function", "function": {"name": n, "arguments": a}}
                    for i, (n, a) in enumerate(calls)
                ]
                message["tool_calls"] = made
                number += len(made)
            messages.append(message)
            if calls:
                messages += [{"role": "tool", "tool_call_id": c["id"], "content": draw(text)} for c in made]
        if draw(st.booleans()):
            messages.append({"role": "assistant", "content": draw(text)})
    return {"messages": messages, "tools": draw(st.sampled_from([TOOLS, TOOLS]))}


def said(name: str, t: Trajectory) -> list[str]:
    """NFC where the tokenizer has it; Qwen3's template cuts leading newlines of a message that ends the render."""
    return [unicodedata.normalize("NFC", spoken(name, t.messages[k])) for k in t.assistant_turns()]


def check(chat, name, record, thinking):
    chosen = Data(special_tokens=SpecialTokens.escape, thinking=thinking)
    try:
        t = read_trajectory(Record("", json.dumps(record).encode(), 0), source("openai"))
        t = trajectory_options.without_special_tokens(
            trajectory_options.without_thinking(t, chosen), chat.special, chosen
        )
    except Rejected as error:
        assert error.code.value in ("no_supervised", "schema", "special_token"), error
        return
    turns = t.assistant_turns()
    encoded = chat.encode(t, turns, thinking)
    assert_proved(chat, t, encoded, turns)
    shown = [chat.tokenizer.decode(e.tokens[u.prompt : u.end]) for e in encoded for u in e.turns]
    for mine, theirs in zip(shown, said(name, t), strict=True):
        assert unicodedata.normalize("NFC", mine).lstrip("\n") == theirs.lstrip("\n")
        assert sum(mine.count(stop) for stop in chat.family.stops) == 1


@pytest.fixture(params=OFFICIAL)
def named(request, reference):
    return request.param, official(reference, request.param)


def thinking_of(name, thinking):
    return Thinking.drop if name == "qwen3-2507" else thinking


COMMON = dict(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)


@pytest.mark.run
@settings(max_examples=150, **COMMON)
@given(record=records(nasty), thinking=st.sampled_from([Thinking.supervise, Thinking.context, Thinking.drop]))
def test_the_proof_holds(named, record, thinking):
    name, chat = named
    check(chat, name, record, thinking_of(name, thinking))


@pytest.mark.slow
@settings(max_examples=1000, **COMMON)
@given(record=records(nasty, most=12), thinking=st.sampled_from([Thinking.supervise, Thinking.context, Thinking.drop]))
def test_the_proof_holds_on_thousands(named, record, thinking):
    name, chat = named
    check(chat, name, record, thinking_of(name, thinking))


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) for n in ("qwen3", "glm4.5", "qwen3-2507")])
def test_it_holds_for_500_messages(reference, name):
    chat = official(reference, name)
    messages = [{"role": "user", "content": "go"}]
    for n in range(249):
        made = {"id": f"c{n}", "type": "function", "function": {"name": "read", "arguments": {"n": n, "s": str(n)}}}
        messages.append({"role": "assistant", "content": ODD[n % len(ODD)].strip("\n"), "tool_calls": [made]})
        messages.append({"role": "tool", "tool_call_id": f"c{n}", "content": ODD[(n * 7) % len(ODD)] * 5})
    messages.append({"role": "assistant", "content": "done"})
    check(chat, name, {"messages": messages, "tools": TOOLS}, thinking_of(name, Thinking.supervise))
