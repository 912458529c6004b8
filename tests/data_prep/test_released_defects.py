"""What the released pipeline did to its samples, case by case: each of these would fail with its defect."""

import json
import os
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from data_prep.records import Record
from data_prep.sources import read_trajectory, source
from recipes.errors import DataError
from tests.data_prep.pack.test_dataset import fresh, record  # noqa: F401  # a fixture
from tests.data_prep.recorded.support import answer, content, log, logged, request, response, text
from tests.data_prep.support import TOOL, assert_proved, assistant, call, conversation, official, result, user


def through_arrow(records):
    """What Parquet of nested dictionaries does to rows with unlike keys."""
    return pa.Table.from_pylist(records).to_pylist()


def test_null_filling_by_parquet_does_not_reach_the_text(reference):
    """Defect 1: every call got every other tool's keys, and GLM's template showed them."""
    messages = [
        user(),
        assistant("", call("1", path="a")),
        result("1"),
        assistant("", call("2", command="ls")),
        result("2"),
        assistant("done"),
    ]
    f = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": f}]
    (filled,) = through_arrow([{"messages": messages, "tools": tools}])
    assert filled["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"path": "a", "command": None}
    chat = official(reference, "glm4.5")
    t = read_trajectory(Record("", json.dumps(filled).encode(), 0), source("limi"))
    (encoded,) = chat.encode(t, t.assistant_turns())
    text_of = chat.tokenizer.decode(encoded.tokens)
    assert (
        text_of.count("null") == text_of.count('"defer_loading": null') == 1 and text_of.count("<arg_key>") == 2 + 2
    ), "two in the tools' text, two of the calls"


def test_one_argument_name_with_two_types_drops_nothing(fresh):  # noqa: F811
    """Defect 2: the second type made the sample vanish, depending on the order."""
    from data_prep.pack.dataset import prepare

    recipe, source_of = fresh
    both = [
        record(user(str(n)), assistant("", call("1", a=value)), result("1"), assistant("x"))
        for n, value in enumerate((5, "5"))
    ]
    assert prepare(recipe, source_of(*both)).manifest["counts"]["kept"] == 2
    assert prepare(recipe, source_of(*reversed(both))).manifest["counts"]["kept"] == 2


def test_a_long_sample_is_an_error_by_name_and_not_dropped(fresh):  # noqa: F811
    """Defect 2: over 125,000 tokens they were left out in silence."""
    from data_prep.pack.dataset import prepare

    recipe, source_of = fresh
    recipe.data.max_tokens = 300
    with pytest.raises(DataError, match="long: too_long"):
        prepare(recipe, source_of(record(user("word " * 400), assistant("x"), id="long")))


def test_rows_are_not_duplicated_to_fill_a_batch(fresh):  # noqa: F811
    """Defect 3: 78 samples became 156."""
    from data_prep.pack.dataset import prepare

    recipe, source_of = fresh
    recipe.optim.batch_size = 64
    data = prepare(recipe, source_of(*(record(user(str(n)), assistant("x")) for n in range(5))))
    assert len(data.ids) == len(set(data.ids)) == 5


def test_arguments_that_do_not_parse_are_not_replaced_by_nothing():
    """Defect 3: they became {}."""
    broken = {
        "messages": [
            user(),
            {
                "role": "assistant",
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{a"}}],
            },
        ],
        "tools": [TOOL],
    }
    with pytest.raises(DataError, match="arguments of 'f': not JSON"):
        read_trajectory(Record("", json.dumps(broken).encode(), 0), source("openai"))


def test_an_event_log_keeps_its_last_answer_its_errors_and_the_order_of_its_parts():
    """Defect 4: only the last request was read, errors became empty, all text came before all calls."""
    t = logged(
        log(
            request(
                content("user", text("go")),
                content("model", text("one"), {"functionCall": {"id": "1", "name": "f", "args": {}}}, text("two")),
                content("user", response("1", {"error": "denied"})),
            ),
            answer(text("Done.")),
        )
    )
    assert [m.content for m in t.messages] == ["be good", "go", "one", "denied", "two", "Done."]


CASES = {
    "single tool calls, one user turn": [user(), assistant("", call("1", a=1)), result("1"), assistant("done")],
    "parallel tool calls": [
        user(),
        assistant("", call("1", a=1), call("2", a=2)),
        result("1"),
        result("2"),
        assistant("done"),
    ],
    "reasoning, one user turn": [
        user(),
        assistant("", call("1", a=1), reasoning_content="r"),
        result("1"),
        assistant("done", reasoning_content="s"),
    ],
    "reasoning, two user turns": [
        user(),
        assistant("1", reasoning_content="r"),
        user(),
        assistant("2", reasoning_content="s"),
    ],
    "no reasoning, tool loop": [
        user(),
        assistant("", call("1", a=1)),
        result("1"),
        assistant("", call("2", a=1)),
        result("2"),
        assistant("done"),
    ],
}
DIFFER = {  # FACTS.md, defect 5: which of slime's two masks gives other tokens than the chat template
    ("glm4.5", "single tool calls, one user turn"): {"qwen3"}, ("glm4.5", "parallel tool calls"): {"qwen", "qwen3"},
    ("glm4.5", "reasoning, two user turns"): {"qwen", "qwen3"}, ("qwen3", "reasoning, one user turn"): {"qwen"},
    ("qwen3", "reasoning, two user turns"): {"qwen", "qwen3"}, ("qwen3", "no reasoning, tool loop"): {"qwen", "qwen3"},
}  # fmt: skip


@pytest.mark.contract
@pytest.mark.parametrize(("family", "case"), DIFFER)
def test_where_slimes_masks_differ_ours_is_proved(reference, family, case):
    """Defect 5: masks stitched together message by message are not the text that inference sends."""
    root = os.environ.get("SLIME_ROOT")
    if not root:
        pytest.skip("SLIME_ROOT is not set")
    sys.path.insert(0, str(Path(root) / "slime" / "utils"))
    from mask_utils import MultiTurnLossMaskGenerator

    chat = official(reference, family)
    t = conversation(*CASES[case])
    encoded = chat.encode(t, t.assistant_turns())
    assert_proved(chat, t, encoded, t.assistant_turns())
    stops = {int(e.tokens[u.end - 1]) for e in encoded for u in e.turns}
    assert stops <= chat.stop_ids, "every turn's stop token is trained"
    for kind in ("qwen", "qwen3"):
        try:
            theirs, mask = MultiTurnLossMaskGenerator(chat.tokenizer, kind).get_loss_mask(t.chat(), tools=t.tools)
        except Exception:  # a generator that fails gives other tokens too
            theirs, mask = [], []
        whole = chat.tokenizer.apply_chat_template(t.chat(), tools=t.tools, return_dict=False)
        assert (theirs != whole) == (kind in DIFFER[family, case]), kind
        if family == "glm4.5" and theirs == whole:
            assert not any(m and token in chat.stop_ids for token, m in zip(theirs, mask, strict=True)), "no stop token"
