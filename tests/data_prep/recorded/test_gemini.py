"""The dialect `gemini`, through event logs of SII-CLI."""

import pytest

from tests.data_prep.recorded.support import (
    answer,
    called,
    content,
    log,
    logged,
    request,
    response,
    text,
)


def test_merges_the_requests_and_keeps_the_last_answer():
    first = [content("user", text("go"))]
    said = content("model", text("look", thought=True), text("I look."), called("1", a="x"))
    again = [
        *first,
        content("model", text("I look."), called("1", a="x")),
        content("user", response("1", {"output": "found"})),
    ]
    t = logged(log(request(*first), answer(*said["parts"]), request(*again), answer(text("Done."))))
    assert t.id == "s1"
    assert t.repairs == ["with the reasoning of the answer, which the client did not send back: message 2"]
    assert [m.role for m in t.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert t.messages[2].reasoning_content == "look", "the thought that later requests leave out"
    assert (t.messages[2].content, t.messages[3].content, t.messages[4].content) == ("I look.", "found", "Done.")
    assert t.tools[0]["function"]["parameters"] == {"type": "object", "properties": {"a": {"type": "string"}}}


def test_keeps_errors_and_results_without_ids():
    t = logged(
        log(
            request(content("user", text("go"))),
            answer(called(None, a="x"), called(None, a="y")),
            request(
                content("user", text("go")), content("model", called(None, a="x"), called(None, a="y")),
                content("user", response(None, {"error": "no such file"}), response(None, {"output": {"lines": 2}})),
            ),
            answer(text("Done.")),
        ),
    )  # fmt: skip
    results = [m for m in t.messages if m.role == "tool"]
    assert [(m.content, m.is_error) for m in results] == [("no such file", True), ('{"lines": 2}', None)]
    assert [m.tool_call_id for m in results] == ["call_2_0", "call_2_1"]


def test_keeps_the_order_of_parts():
    t = logged(
        log(
            request(
                content("user", text("go")), content("model", text("one"), called("1"), text("two"), called("2")),
                content("user", response("1", {"output": "r1"}), response("2", {"output": "r2"}), text("and now?")),
            ),
            answer(text("Done.")),
        ),
    )  # fmt: skip
    shown = [(m.role, m.content) for m in t.messages[1:]]
    assert shown == [
        ("user", "go"), ("assistant", "one"), ("tool", "r1"), ("assistant", "two"), ("tool", "r2"), ("user", "and now?"),
        ("assistant", "Done."),
    ]  # fmt: skip
    assert t.repairs == [
        "event 1: text after a call starts a new turn",
        "said by no recorded answer, so shown and not learned: messages 2, 4",
    ]


def test_what_an_answer_has_after_a_call_is_not_learned():
    """No template can render it there, and in its place after the results no model said it."""
    asked, said = content("user", text("go")), (text("one"), called("1"), text("two"))
    heard = content("user", response("1", {"output": "r"}))
    t = logged(
        log(request(asked), answer(*said), request(asked, content("model", *said), heard), answer(text("Done.")))
    )
    assert [(m.role, m.content, m.weight) for m in t.messages[2:]] == [
        ("assistant", "one", None), ("tool", "r", None), ("assistant", "two", 0), ("assistant", "Done.", None)
    ]  # fmt: skip
    assert "event 1: what its answer has after a call is not learned" in t.repairs


def results_of(*responses):
    calls = [called(str(n)) for n in range(len(responses))]
    answers = [response(str(n), value) for n, value in enumerate(responses)]
    t = logged(
        log(
            request(content("user", text("a")), content("model", *calls), content("user", *answers)), answer(text("b"))
        ),
    )
    return [(m.content, m.is_error) for m in t.messages if m.role == "tool"]


def test_shows_all_of_a_response():
    assert results_of({"output": "o", "stderr": "e"}, {"error": ""}, {"output": "o", "error": "e"}, None, {}, "x") == [
        ('{"output": "o", "stderr": "e"}', None), ("", True), ("o\ne", True), ("null", None), ("{}", None), ("x", None),
    ]  # fmt: skip


def test_keeps_the_logs_order_of_results():
    asked = [content("user", text("a")), content("model", called("1"), called("2"))]
    t = logged(
        log(
            request(*asked, content("user", response("2", "two")), content("user", response("1", "one"))),
            answer(text("b")),
        ),
    )
    assert [m.content for m in t.messages if m.role == "tool"] == ["two", "one"]


CHUNKS = [{"candidates": [{"content": {"parts": [{"text": piece}]}}]} for piece in ("do", "ne")]


@pytest.mark.parametrize(
    "whole",
    [
        {"full_response": {"parts": [{"text": "done"}]}},
        {"full_response": None, "response": {"parts": [{"text": "done"}]}},
        {"full_response": "done"},
        {"full_response": CHUNKS},
    ],
)
def test_reads_an_answer_whole_wrapped_or_in_chunks(whole):
    t = logged(log(request(content("user", text("a"))), {"data": whole}))
    assert t.messages[-1].content == "done" and t.repairs == []


def test_takes_an_answer_that_was_logged_twice_once():
    first = request(content("user", text("a")))
    t = logged(log(first, answer(text("b")), answer(text("b")), first, answer(text("b"))))
    assert [m.content for m in t.messages] == ["be good", "a", "b"]


def test_names_what_it_moves_or_leaves():
    two = {"data": {"full_response": {"candidates": [{"content": {"parts": [{"text": "b"}]}}, {"content": {}}]}}}
    said = [
        content("user", text("a")),
        content("model", text("x"), text("y", thought=True), called("1")),
        content("user", text("wait")),
        content("user", response("1", "r")),
    ]
    assert logged(log(request(*said), two)).repairs == [
        "event 1: a thought after text was moved before it",
        "event 1: a user's text before a tool result was moved after it",
        "event 1: has 2 candidates; the first is used",
        "said by no recorded answer, so shown and not learned: message 2",
    ]


def test_gives_calls_without_an_id_one_that_is_free():
    said = [
        content("user", text("a")),
        content("model", called("call_1"), called(None)),
        content("user", response("call_1", "1"), response(None, "2")),
    ]
    t = logged(log(request(*said), answer(text("b"))))
    assert [c.id for c in t.messages[2].tool_calls] == ["call_1", "call_2_1"]


def test_lowers_types_of_schemas_and_nothing_else():
    schema = {
        "type": "OBJECT",
        "properties": {
            "type": {"type": ["STRING", "NULL"], "default": {"type": "FILE"}},
            "l": {"type": "ARRAY", "items": {"type": "STRING"}},
        },
    }
    tools = [{"functionDeclarations": [{"name": "f", "parameters": schema}]}]
    t = logged(log(request(content("user", text("a")), tools=tools), answer(text("b"))))
    assert t.tools[0]["function"]["parameters"]["properties"] == {
        "type": {"type": ["string", "null"], "default": {"type": "FILE"}}, "l": {"type": "array", "items": {"type": "string"}},
    }  # fmt: skip
