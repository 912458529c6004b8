"""Which calls are one conversation, and which of its turns are learned."""

import pytest

from data_prep.trajectory import Rejected
from tests.data_prep.recorded.support import conversations

SYSTEM, GO = {"role": "system", "content": "You work."}, {"role": "user", "content": "List."}
TOOL = {
    "type": "function",
    "function": {"name": "bash", "parameters": {"type": "object", "properties": {"command": {"type": "string"}}}},
}


def asks(number, command="ls"):
    function = {"name": "bash", "arguments": f'{{"command": "{command}"}}'}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": f"c{number}", "type": "function", "function": function}],
    }


def says(text):
    return {"role": "assistant", "content": text}


def found(number, text="a.txt"):
    return {"role": "tool", "tool_call_id": f"c{number}", "content": text}


def call(messages, answer, tools=(TOOL,), finish="stop", **more):
    response = None if answer is None else {"choices": [{"message": answer, "finish_reason": finish}]}
    return {"kind": "call", "request": {"messages": messages, "tools": [*tools]}, "response": response, **more}


def shown(t):
    return [(m.role, m.content, m.weight) for m in t.messages]


def test_a_call_that_extends_another_is_the_same_conversation():
    history = [SYSTEM, GO, asks(1), found(1)]
    (t,) = conversations(call(history[:2], asks(1)), call(history, says("Done.")))
    assert t.id == "s1" and t.repairs == [] and t.metadata == {"calls": 2, "session": "s1"}
    assert [m.role for m in t.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert all(m.weight is None for m in t.messages)


def test_a_turn_that_no_answer_holds_is_context():
    greeting = [SYSTEM, {"role": "user", "content": "Context."}, says("Got it."), GO]
    (t,) = conversations(call(greeting, says("Done.")))
    assert shown(t)[2:] == [("assistant", "Got it.", 0), ("user", "List.", None), ("assistant", "Done.", None)]
    assert t.repairs == ["said by no recorded answer, so shown and not learned: message 2"]


def test_the_answer_is_learned_as_the_server_gave_it_with_the_ids_of_the_history():
    """Most clients send no reasoning back, and some new ids."""
    thought = {**asks(1), "reasoning_content": "Look."}
    (t,) = conversations(call([GO], thought), call([GO, asks(7), found(7)], says(" Done.\n")), call(
        [GO, asks(7), found(7), says("Done."), GO], says("Again.")))  # fmt: skip
    assert t.messages[1].reasoning_content == "Look." and t.messages[1].tool_calls[0].id == "c7"
    assert t.messages[3].content == " Done.\n" and all(m.weight is None for m in t.messages)
    assert t.repairs == ["with the reasoning of the answer, which the client did not send back: message 1"]


def test_a_retry_replaces_the_answer_before_it_and_a_failed_call_does_not():
    (t,) = conversations(
        call([GO], says("First.")), call([GO], says("Second.")), call([GO], None, status=500), {"kind": "tool", "name": "x"}
    )  # fmt: skip
    assert shown(t)[-1] == ("assistant", "Second.", None)
    assert "line 2 repeats line 1, a retry: the later answer is taken" in t.repairs
    (t,) = conversations(call([GO], None, status=500), call([GO], says("Done.")))
    assert shown(t)[-1] == ("assistant", "Done.", None) and "line 1: has no answer" in t.repairs


@pytest.mark.parametrize(
    "cut",
    [{"finish": "length"}, {"complete": False}],
    ids=["at the limit of tokens", "in its stream"],
)
def test_an_answer_that_is_not_whole_is_shown_and_not_learned(cut):
    """Learned, it would teach to stop in the middle."""
    (t,) = conversations(call([GO], says("I was c"), **cut), call([GO, says("I was c"), GO], says("Done.")))
    assert shown(t) == [
        ("user", "List.", None), ("assistant", "I was c", 0), ("user", "List.", None), ("assistant", "Done.", None)
    ]  # fmt: skip
    assert "shown, not learned" in t.repairs[0]


def test_a_side_call_is_left_out_and_named():
    title = [{"role": "user", "content": "A title for this talk."}]
    history = [SYSTEM, GO, asks(1), found(1)]
    (t,) = conversations(call(history[:2], asks(1)), call(title, says("Listing")), call(history, says("Done.")))
    assert t.id == "s1" and "line 2, a side call, is left out: 'A title for this talk.'" in t.repairs
    (t,) = conversations(
        call(history[:2], asks(1)), call(history, says("Done.")), call(title, says("Listing"), tools=())
    )
    assert "line 3, a side call, is left out: 'A title for this talk.'" in t.repairs


def test_a_sub_agent_is_a_record_of_its_own():
    other = [SYSTEM, {"role": "user", "content": "Search."}]
    history = [SYSTEM, GO, asks(1), found(1)]
    main, sub = conversations(
        call(history[:2], asks(1)), call(other, asks(5, "grep")), call([*other, asks(5, "grep"), found(5)], says("Found.")),
        call(history, says("Done.")),
    )  # fmt: skip
    assert (main.id, sub.id) == ("s1/1", "s1/2") and sub.messages[1].content == "Search."
    assert all(m.weight is None for t in (main, sub) for m in t.messages)


def test_a_history_that_was_compacted_or_changed_begins_a_record_and_no_turn_is_learned_twice():
    history = [SYSTEM, GO, asks(1), found(1)]
    cleared = [*history[:3], found(1, "[cleared]")]
    first, second, third = conversations(
        call(history[:2], asks(1)), call(history, says("Done.")),
        call([*cleared, says("Done."), GO], says("More.")),
        call([SYSTEM, {"role": "user", "content": "Summary: listed."}], says("Going on.")),
    )  # fmt: skip
    assert [m.weight for m in first.messages if m.role == "assistant"] == [None, None]
    assert [m.weight for m in second.messages if m.role == "assistant"] == [0, 0, None]
    assert "learned in another conversation of the session, so shown alone: messages 2, 4" in second.repairs
    assert shown(third)[1:] == [("user", "Summary: listed.", None), ("assistant", "Going on.", None)]


def test_other_tools_begin_a_record():
    other = {"type": "function", "function": {"name": "grep", "parameters": {"type": "object", "properties": {}}}}
    first, second = conversations(call([GO], says("a")), call([GO, says("a"), GO], says("b"), tools=(TOOL, other)))
    assert len(first.tools) == 1 and len(second.tools) == 2
    assert [m.weight for m in second.messages if m.role == "assistant"] == [0, None]


def test_a_log_without_an_answer_is_refused():
    with pytest.raises(Rejected, match="none of its 2 recorded calls has an answer"):
        conversations(call([GO], None, status=500), call([GO], None))


def test_a_question_before_the_conversation_is_no_side_call_and_a_cut_retry_keeps_the_whole_answer():
    history = [SYSTEM, GO, asks(1), found(1)]
    before = [SYSTEM, {"role": "user", "content": "What is this?"}]
    first, _ = conversations(call(before, says("A log.")), call(history[:2], asks(1)), call(history, says("Done.")))
    assert shown(first)[-1] == ("assistant", "A log.", None)
    (t,) = conversations(call([GO], says("Whole.")), call([GO], says("Who"), complete=False))
    assert shown(t)[-1] == ("assistant", "Whole.", None)
    assert "line 2 repeats line 1, a retry: the earlier answer is kept" in t.repairs
