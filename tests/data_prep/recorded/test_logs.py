"""Recorded calls as they lie on disk, and in every dialect."""

import json

import pytest

from data_prep.trajectory import Rejected
from tests.data_prep.recorded.support import conversations

PARAMETERS = {"type": "object", "properties": {"command": {"type": "string"}}}
FUNCTION = {"type": "function", "function": {"name": "bash", "description": "Runs.", "parameters": PARAMETERS}}
GO = {"role": "user", "content": "List."}
ASKED = {"id": "c1", "type": "function", "function": {"name": "bash", "arguments": '{"command": "ls"}'}}
ASKS = {"role": "assistant", "content": "I look.", "reasoning_content": "Look.", "tool_calls": [ASKED]}
DONE = {"role": "assistant", "content": "There is a.txt."}
WHOLE = [
    {"role": "system", "content": "You work.\nWell."},
    GO,
    ASKS,
    {"role": "tool", "content": "a.txt", "tool_call_id": "c1"},
    DONE,
]


def openai():
    history = WHOLE[:4]
    for sent, said in ((history[:2], ASKS), (history, DONE)):
        yield {"messages": sent, "tools": [FUNCTION]}, {"choices": [{"message": said, "finish_reason": "stop"}]}


def anthropic():
    tools = [{"name": "bash", "description": "Runs.", "input_schema": PARAMETERS}]
    system = [
        {"type": "text", "text": "You work."},
        {"type": "text", "text": "Well.", "cache_control": {"type": "ephemeral"}},
    ]
    said = [
        {"type": "thinking", "thinking": "Look.", "signature": "x"},
        {"type": "text", "text": "I look."},
        {"type": "tool_use", "id": "c1", "name": "bash", "input": {"command": "ls"}},
    ]
    heard = {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "a.txt"}]}
    history = [{"role": "user", "content": [{"type": "text", "text": "List."}]}]
    yield {"system": system, "messages": history, "tools": tools}, {"content": said, "stop_reason": "tool_use"}
    history = [*history, {"role": "assistant", "content": said}, {"role": "user", "content": [heard]}]
    done = {"type": "message", "content": [{"type": "text", "text": "There is a.txt."}], "stop_reason": "end_turn"}
    yield {"system": system, "messages": history, "tools": tools}, done


def responses():
    tools = [{"type": "function", "name": "bash", "description": "Runs.", "parameters": PARAMETERS}]
    said = [
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Look."}]},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "I look.", "annotations": []}],
        },
        {"type": "function_call", "call_id": "c1", "name": "bash", "arguments": '{"command": "ls"}'},
    ]
    heard = {"type": "function_call_output", "call_id": "c1", "output": "a.txt"}
    done = [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "There is a.txt."}]}]
    for sent, output in (([GO], said), ([GO, *said, heard], done)):
        yield (
            {"instructions": "You work.\nWell.", "input": sent, "tools": tools},
            {"output": output, "status": "completed"},
        )


def gemini():
    tools = [{"functionDeclarations": [{"name": "bash", "description": "Runs.", "parameters": PARAMETERS}]}]
    said = [
        {"text": "Look.", "thought": True},
        {"text": "I look."},
        {"functionCall": {"id": "c1", "name": "bash", "args": {"command": "ls"}}},
    ]
    heard = {"functionResponse": {"id": "c1", "name": "bash", "response": {"output": "a.txt"}}}
    history = [{"role": "user", "parts": [{"text": "List."}]}]
    system = {"parts": [{"text": "You work.\nWell."}]}
    yield (
        {"contents": history, "systemInstruction": system, "tools": tools},
        {"candidates": [{"content": {"parts": said}}]},
    )
    history = [*history, {"role": "model", "parts": said}, {"role": "user", "parts": [heard]}]
    done = {"candidates": [{"content": {"parts": [{"text": "There is a.txt."}]}, "finishReason": "STOP"}]}
    yield {"contents": history, "systemInstruction": system, "tools": tools}, done


DIALECTS = [openai, anthropic, responses, gemini]


def written(messages):
    return [m.model_dump(exclude_none=True, exclude={"name"}) for m in messages]


@pytest.mark.parametrize("named", [True, False], ids=["named", "told from its fields"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_says_the_same(dialect, named):
    calls = [{"request": sent, "response": said} for sent, said in dialect()]
    (t,) = conversations(*({**c, "dialect": dialect.__name__} if named else c for c in calls))
    (same,) = conversations(*({"request": sent, "response": said} for sent, said in openai()))
    assert written(t.messages) == written(same.messages) and t.tools == same.tools
    assert [m.weight for m in t.messages] == [None] * 5


def test_a_folder_with_one_file_a_call_is_one_log(tmp_path):
    """As Qwen Code and OpenHands write it."""
    (tmp_path / "talk").mkdir()
    for number, (sent, said) in enumerate(openai()):
        (tmp_path / "talk" / f"openai-{number}.json").write_text(
            json.dumps({"request": sent, "response": said}, indent=1)
        )
    (t,) = conversations(folder=tmp_path, name="")
    assert t.id == "talk" and len(t.messages) == 5
    for number, (sent, said) in enumerate(openai()):
        path = tmp_path / "talk" / f"openai-{number}.json"
        path.write_text(json.dumps({**sent, "kwargs": {"temperature": 0}, "cost": 0.1, "response": said}))
    (t,) = conversations(folder=tmp_path, name="")
    assert t.id == "talk" and len(t.messages) == 5


def test_what_a_session_says_of_itself_is_metadata():
    calls = [{"kind": "call", "request": sent, "response": said} for sent, said in openai()]
    start = {"kind": "start", "time": 1, "task": "t7", "agent": "mini"}
    (t,) = conversations(start, *calls, {"kind": "verdict", "time": 9, "passed": True})
    assert t.metadata == {"calls": 2, "session": "s1", "task": "t7", "agent": "mini", "passed": True}


def test_a_line_that_was_cut_at_the_end_is_named_and_one_before_it_is_refused(tmp_path):
    lines = [json.dumps({"kind": "call", "request": sent, "response": said}) for sent, said in openai()]
    path = tmp_path / "s1.jsonl"
    path.write_text("\n".join([*lines, lines[0][:30]]))
    (t,) = conversations(folder=tmp_path, name="s1.jsonl")
    assert "line 3 is cut in the middle, as a session that was killed leaves it" in t.repairs
    path.write_text("\n".join([lines[0], lines[0][:30], lines[1]]))
    with pytest.raises(Rejected, match="line 2: not JSON"):
        conversations(folder=tmp_path, name="s1.jsonl")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"id": 1, "text": "x"}, "no recorded call: it has id, text"),
        (
            {"request": {"messages": [GO]}, "response": {"choices": []}, "dialect": "grpc"},
            "dialect 'grpc' is not known",
        ),
        ({"request": 5, "response": {}}, "a request is an object, this is int"),
        ({"request": {"messages": 5}, "response": {"choices": []}}, "messages is int, not a list"),
        (
            {"request": {"input": [GO], "previous_response_id": "r1"}, "response": {}},
            "continues 'r1', which the server kept",
        ),
        (
            {"request": {"input": [GO]}, "response": {"output": [{"type": "reasoning", "encrypted_content": "x"}]}},
            "a thought is encrypted",
        ),
        (
            {
                "request": {"system": "a", "messages": [GO]},
                "response": {"content": [{"type": "redacted_thinking", "data": "x"}]},
            },
            "an encrypted thought",
        ),
        (
            {
                "request": {"system": "a", "messages": [{"role": "user", "content": [{"type": "image"}]}]},
                "response": {},
            },
            "a block of type 'image'",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(line, says):
    with pytest.raises(Rejected, match=says):
        conversations(line)


@pytest.mark.parametrize(
    ("dialect", "ends"),
    [
        (openai, {"choices": [{"message": DONE, "finish_reason": "abort"}]}),
        (openai, {"choices": [{"message": DONE, "finish_reason": None}]}),
        (anthropic, {"content": [{"type": "text", "text": "x"}], "stop_reason": "model_context_window_exceeded"}),
        (anthropic, {"content": [{"type": "text", "text": "x"}], "stop_reason": None}),
        (responses, {"output": [{"type": "message", "role": "assistant", "content": "x"}], "status": "in_progress"}),
        (gemini, {"candidates": [{"content": {"parts": [{"text": "x"}]}, "finishReason": "MALFORMED_FUNCTION_CALL"}]}),
    ],
)
def test_an_answer_that_does_not_say_that_it_is_whole_is_not_learned(dialect, ends):
    first, (sent, _) = dialect()
    calls = [{"request": r, "response": a, "dialect": dialect.__name__} for r, a in (first, (sent, ends))]
    (t,) = conversations(*calls)
    assert [m.weight for m in t.messages if m.role == "assistant"] == [None, 0]
    assert any("it ended with" in repair for repair in t.repairs)


def test_tools_and_system_prompt_in_the_options_of_a_call_are_read():
    """OpenHands writes what it passed on as kwargs, Gemini's SDK as config."""
    ((sent, said), _) = openai()
    (t,) = conversations(
        {"messages": sent["messages"], "kwargs": {"tools": sent["tools"]}, "args": [], "response": said}
    )
    assert len(t.tools) == 1
    ((sent, said), _) = gemini()
    config = {k: v for k, v in sent.items() if k != "contents"}
    (t,) = conversations(
        {"request": {"contents": sent["contents"], "config": config}, "response": said, "dialect": "gemini"}
    )
    assert len(t.tools) == 1 and t.messages[0].content == "You work.\nWell."


def test_logs_of_one_name_in_two_folders_are_two_sessions(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder / "openai").mkdir(parents=True)
        for number, (sent, said) in enumerate(openai()):
            (tmp_path / folder / "openai" / f"{number}.json").write_text(
                json.dumps({"request": sent, "response": said})
            )
    assert [t.id for t in conversations(folder=tmp_path, name="")] == ["a/openai", "b/openai"]
