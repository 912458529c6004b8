"""Sessions of Claude Code: a tree of lines, of which one branch is what happened."""

import contextlib
import json

import pytest

from data_prep.given import Given
from data_prep.reading import Reading
from data_prep.sources import read_trajectory, source
from data_prep.trajectory import Rejected


def line(uuid, parent, kind, content, **more):
    message = {"role": kind, "content": content, **more.pop("message", {})}
    return {"type": kind, "uuid": uuid, "parentUuid": parent, "sessionId": "s", "message": message, **more}


def user(uuid, parent, content, **more):
    return line(uuid, parent, "user", content, **more)


def said(uuid, parent, block, identity, **more):
    return line(uuid, parent, "assistant", [block], message={"id": identity, "model": "glm-4.5"}, **more)


def text(value):
    return {"type": "text", "text": value}


def use(identity):
    return {"type": "tool_use", "id": identity, "name": "Bash", "input": {"command": identity}}


def result(uuid, parent, identity, content="out", **more):
    return user(uuid, parent, [{"type": "tool_result", "tool_use_id": identity, "content": content}], **more)


@pytest.fixture
def read(tmp_path):
    def reading(*lines, name="s.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(one) + "\n" for one in lines))
        module = source("claude_code")
        return [read_trajectory(record, module) for record in module.records(tmp_path)]

    return reading


def shown(t):
    return [(m.role, m.content or [c.id for c in m.tool_calls or []]) for m in t.messages]


def test_blocks_of_a_message_are_one_and_each_result_follows_its_calls(read):
    """Calls of one message are answered one by one, so a result hangs beside the branch that goes on."""
    (t,) = read(
        {"type": "summary", "summary": "x", "leafUuid": "8"},
        user("1", None, "List."),
        said("2", "1", {"type": "thinking", "thinking": "Look.", "signature": "x"}, "m1"),
        said("3", "2", use("a"), "m1"),
        result("4", "3", "a"),
        said("5", "3", use("b"), "m1"),
        result("6", "5", "b", [{"type": "text", "text": "out b"}]),
        {"type": "progress", "uuid": "7", "parentUuid": "6", "data": {}},
        said("8", "7", text("Done."), "m2"),
    )
    assert t.id == "s" and t.messages[1].reasoning_content == "Look."
    assert shown(t) == [
        ("user", "List."), ("assistant", ["a", "b"]), ("tool", "out"), ("tool", "out b"), ("assistant", "Done.")
    ]  # fmt: skip
    assert t.metadata["models"] == ["glm-4.5"] and t.repairs == []


def test_the_last_branch_is_what_happened_and_others_are_named(read):
    (t,) = read(
        user("1", None, "List."), said("2", "1", text("First."), "m1"), user("3", "2", "No."),
        user("4", "2", "Yes."), said("5", "4", text("Second."), "m2"),
    )  # fmt: skip
    assert shown(t)[1:] == [("assistant", "First."), ("user", "Yes."), ("assistant", "Second.")]
    assert "1 other branches left out" in t.repairs


def test_what_follows_a_compaction_is_a_record_and_so_is_a_sub_agent(read):
    records = read(
        user("1", None, "List."),
        said("2", "1", text("First."), "m1"),
        {"type": "system", "subtype": "compact_boundary", "uuid": "3", "parentUuid": None},
        user("4", "3", "Summary: listed.", isCompactSummary=True),
        said("5", "4", text("Second."), "m2"),
        user("6", None, "Search.", isSidechain=True, agentId="agent1"),
        said("7", "6", text("Found."), "m3", isSidechain=True, agentId="agent1"),
    )
    assert [t.id for t in records] == ["s/1", "s/2", "s/agent1"]
    assert [shown(t)[0][1] for t in records] == ["List.", "Summary: listed.", "Search."]


def test_files_of_sub_agents_below_the_session_are_read(read):
    read(user("1", None, "List."), said("2", "1", text("First."), "m1"))
    agent = {"isSidechain": True, "agentId": "a1"}
    records = read(
        user("1", None, "Search.", **agent), said("2", "1", text("Found."), "m1", **agent), name="subagents/agent-a1.jsonl"
    )  # fmt: skip
    assert [t.id for t in records] == ["s", "s/a1"]


def test_what_no_model_said_is_not_learned(read):
    synthetic = {"message": {"id": "m9", "model": "<synthetic>"}}
    (t,) = read(
        user("1", None, "List."),
        line("2", "1", "assistant", [text("API Error: 529")], isApiErrorMessage=True, **synthetic),
        line(
            "3", "2", "assistant", [text("No response requested.")], **{"message": {"id": "m8", "model": "<synthetic>"}}
        ),
        user("4", "3", "Go on."),
        said("5", "4", text("Done."), "m1"),
    )
    assert [(m.content, m.weight) for m in t.messages] == [
        ("List.", None), ("No response requested.", 0), ("Go on.", None), ("Done.", None)
    ]  # fmt: skip
    assert "1 errors of the API left out" in t.repairs


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([{"type": "redacted_thinking", "data": "x"}], "encrypted thought"),
        ([{"type": "image", "source": {}}], "'image' cannot become text"),
    ],
)
def test_what_cannot_become_text_refuses_the_session_by_name(read, content, says):
    with pytest.raises(Rejected, match=f"message 1: .*{says}"):
        read(user("1", None, "List."), line("2", "1", "assistant", content, message={"id": "m1", "model": "x"}))


def test_a_file_of_something_else_is_refused(read):
    with pytest.raises(Rejected, match="no line of a conversation.*data=auto"):
        read({"messages": []})


def test_a_last_line_that_was_cut_is_named_and_whatever_stands_in_a_field_is_refused_or_read(read, tmp_path):
    whole = [user("1", None, "List."), said("2", "1", text("Done."), "m1")]
    read(*whole)
    path = tmp_path / "s.jsonl"
    path.write_text(path.read_text() + '{"type": "user", "uu')
    module = source("claude_code")
    (t,) = [read_trajectory(record, module) for record in module.records(tmp_path)]
    assert (
        len(t.messages) == 2
        and "the last line is cut in the middle, as a session that was killed leaves it" in t.repairs
    )
    for junk in (5, "x", None, True, [], {}, [[]], [5]):
        for name in ("uuid", "parentUuid", "type", "message", "sessionId", "isSidechain"):
            with contextlib.suppress(Rejected):
                read(whole[0], {**whole[1], name: junk})
        for name in ("role", "content", "id", "model"):
            with contextlib.suppress(Rejected):
                read(whole[0], {**whole[1], "message": {**whole[1]["message"], name: junk}})


def test_a_cut_message_is_not_learned_and_a_queued_word_of_the_user_is_not_lost(read):
    attached = {
        "type": "attachment",
        "uuid": "4",
        "parentUuid": "3",
        "attachment": {"type": "queued_command", "prompt": "Use Python."},
    }
    todo = {
        "type": "attachment",
        "uuid": "5",
        "parentUuid": "4",
        "attachment": {"type": "todo_reminder", "content": []},
    }
    cut = said("6", "5", text("I use Py"), "m2")
    cut["message"]["stop_reason"] = "max_tokens"
    (t,) = read(
        user("1", None, "List."), said("2", "1", use("a"), "m1"), result("3", "2", "a"), attached, todo, cut,
        user("7", "6", "Go on."), said("8", "7", text("Done."), "m3"),
    )  # fmt: skip
    assert [(m.role, m.content, m.weight) for m in t.messages[3:]] == [
        ("user", "Use Python.", None), ("assistant", "I use Py", 0), ("user", "Go on.", None), ("assistant", "Done.", None)
    ]  # fmt: skip
    assert "message 4 ended with stop_reason 'max_tokens': shown, not learned" in t.repairs
    assert "attachments that the model may have seen are not shown: 1 of todo_reminder" in t.repairs


@pytest.mark.parametrize("identity", ["", "same"])
def test_messages_of_one_id_on_both_sides_of_a_user_are_two(read, identity):
    """Some servers give every message the same id, or none."""
    (t,) = read(
        user("1", None, "One?"), said("2", "1", text("one"), identity), user("3", "2", "Two?"), said("4", "3", text("two"), identity)
    )  # fmt: skip
    assert [m.content for m in t.messages] == ["One?", "one", "Two?", "two"]


def test_a_history_that_was_copied_is_learned_once(read):
    first, second = read(
        user("1", None, "List."), said("2", "1", text("one"), "m1"), user("3", None, "List."), said("4", "3", text("one"), "m1"),
        user("5", "4", "More."), said("6", "5", text("two"), "m2"),
    )  # fmt: skip
    assert [m.weight for m in first.messages] == [None, None]
    assert [(m.content, m.weight) for m in second.messages if m.role == "assistant"] == [("one", 0), ("two", None)]


def test_a_sub_agent_is_not_given_the_main_agents_tools_and_system_prompt(read, tmp_path):
    agent = {"isSidechain": True, "agentId": "a1"}
    read(user("1", None, "Search.", **agent), said("2", "1", text("Found."), "m1", **agent))
    module = source("claude_code")
    (record,) = module.records(tmp_path)
    with pytest.raises(Rejected, match="a sub-agent has tools and a system prompt of its own"):
        read_trajectory(record, module, Reading(given=Given(system="You are the main agent.")))


def test_a_thought_that_was_left_out_of_the_log_is_refused(read):
    with pytest.raises(Rejected, match="a thought was left out of the log"):
        read(user("1", None, "List."), said("2", "1", {"type": "thinking", "thinking": "", "signature": "x"}, "m1"))
