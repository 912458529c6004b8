"""Inputs that people reported (`cases/`): each is read as it was meant, every repair named, or refused with what to write."""

import json
from pathlib import Path

import pytest

from data_prep.pack import trajectory_options
from data_prep.pack.packer import Packer
from data_prep.reading import Reading
from data_prep.recognise import recognise
from data_prep.records import Record
from data_prep.sources import read_trajectory, source
from data_prep.trajectory import Rejected
from recipes.compose.recipe import compose_recipe
from recipes.config import BrokenCalls, Data
from tests.data_prep.support import OFFICIAL, assert_proved, official

FOLDER = Path(__file__).parent / "cases"
KINDS = {
    "claude_code": "claude_code",
    "real_nulls_limi": "limi",
    "sii_canned_turn": "requests",
    "sii_side_call": "requests",
}  # whose source is not openai


@pytest.fixture(scope="module")
def packed(bases):
    """What each record of a file becomes: its ledger line, and its conversation if it is kept."""
    made = {}

    def pack(name, *words, model="qwen3-tiny"):
        kind = KINDS.get(name, "openai")
        if (key := (kind, words, model)) not in made:
            given = [f"data={kind}", "data.path=x", "data.max_tokens=4000", f"model={model}", *words]
            made[key] = Packer(compose_recipe([*given, f"model.checkpoint={bases[model]}"]))
        (path,) = FOLDER.glob(f"{name}.*")
        results = [made[key].pack(record) for record in source(kind).records(path)]
        return [(p.ledger, p.conversations[0][0] if p.conversations else None) for p in results]

    return pack


def calls(conversation):
    return [c.function.arguments for m in conversation.messages for c in m.tool_calls or []]


# File, and what every record's repairs say, in part; an empty text where nothing is repaired.
KEPT = {
    "call_ids": ["1 call ids renamed", "2 missing ids"],
    "control_characters": [""],
    "empty_arguments": ["empty arguments of bash read as {}"],
    "empty_turns": ["message 3 says nothing", "message 1 says nothing"],
    "extra_columns": ["", "", "flat form", "Anthropic's form", "flat form", "'web_search' left out"],
    "first_assistant": ["message 0 opens the conversation"],
    "half_thought": ["message 3: thinking moved", "message 1: thinking moved"],
    "json_text": [
        "tools read from JSON text",
        "messages read from JSON text",
        "message 1: tool_calls read from JSON text",
    ],
    "litellm_fields": ["provider_specific_fields left out"],
    "null_arguments": ["null argument 'path' of bash removed"],
    "null_schemas": ["null function.parameters.properties.path removed", "null function.strict removed"],
    "parts": ["cache_control of a part left out", "", "2 parts joined with a space"],
    "real_nulls_limi": ["", ""],
    "reasoning_twice": ["reasoning read as reasoning_content", "reasoning read as reasoning_content"],
    "sii_canned_turn": ["said by no recorded answer, so shown and not learned: message 2"],
    "sii_side_call": ["event 2, a side call, is left out: 'Write a title for this talk.'"],
    "rows": ["messages read from JSON text; tools read from JSON text"],
    "tool_schemas": [""] * 7,
    "turn_flags": ["train read as weight 0", "loss_mask read as weight 0", ""],
}
# File, overrides, code, and what the reason says.
REFUSED = {
    "afm_row": ("shape", "this record has instruction, input, output"),
    "broken_arguments": ("arguments", "arguments of 'bash': not JSON"),
    "claude_code": ("schema", "the record has no tools: write data.tools=FILE"),
    "cc_bench_row": ("shape", "write data.columns.messages=trajectory"),
    "interrupted": ("missing_result", "message 2: calls ['c1'] have no result"),
    "json_text_columns": ("tool", "write data.columns.tools=available_tools"),
    "renamed_columns": ("shape", "write data.columns.messages=trajectory"),
    "structured_results": ("part", "write the JSON text that the model saw"),
}
# Files that no source reads as they are, and what they are.
UNREAD = {
    "afm_row": "rows of instruction and output",
    "atif": "a trajectory in ATIF",
    "cc_bench_row": "rows of CC-Bench",
    "gemini_session": "a session of Gemini CLI",
    "qwen_code_session": "a session of Qwen Code",
    "tau2_results": "results of tau2-bench",
}


def test_every_file_has_an_expectation():
    assert {p.stem for p in FOLDER.iterdir()} == {*KEPT, *REFUSED, *UNREAD}


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.stem)
def test_auto_finds_the_source_or_says_what_is_missing(path):
    form = recognise(path)
    if path.stem in UNREAD:
        assert form.source is None and form.what.startswith(UNREAD[path.stem]) and form.fix
        return
    assert form.source == KINDS.get(path.stem, "openai").replace("limi", "openai")
    if path.stem in ("renamed_columns", "json_text_columns"):
        assert (
            form.columns
            == {"renamed_columns": {"messages": "trajectory"}, "json_text_columns": {"tools": "available_tools"}}[
                path.stem
            ]
        )


def test_a_session_without_tools_takes_them_and_the_system_prompt_from_files(packed, tmp_path):
    tools, system = tmp_path / "tools.json", tmp_path / "system.txt"
    parameters = {"type": "object", "properties": {"command": {"type": "string"}}}
    tools.write_text(json.dumps([{"name": "Bash", "description": "Runs.", "input_schema": parameters}]))
    system.write_text("You work.\n")
    ((ledger, one),) = packed("claude_code", f"data.tools={tools}", f"data.system={system}")
    assert ledger["status"] == "kept" and [m.role for m in one.messages] == [
        "system", "user", "assistant", "tool", "assistant"
    ]  # fmt: skip
    assert one.messages[0].content == "You work." and one.messages[2].reasoning_content == "Look."
    assert one.tools[0]["function"]["parameters"] == parameters
    assert {"tools of data.tools", "system prompt of data.system"} <= {*ledger["repairs"]}


@pytest.mark.parametrize("model", ["qwen3-tiny", "glm4.5-tiny"])
@pytest.mark.parametrize("name", KEPT)
def test_it_is_read(packed, name, model):
    found = packed(name, model=model)
    assert len(found) == len(KEPT[name])
    for (ledger, _), said in zip(found, KEPT[name], strict=True):
        assert ledger["status"] == "kept", ledger
        repairs = "; ".join(ledger["repairs"])
        if model == "qwen3-tiny" or name != "parts":
            assert said in repairs if said else not ledger["repairs"], repairs


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_what_to_write(packed, name):
    code, said = REFUSED[name]
    for ledger, _ in packed(name):
        assert ledger["status"] == "rejected" and ledger["code"] == code and said in ledger["reason"], ledger


def test_nulls_go_only_where_the_schema_has_no_place_for_them(packed):
    ((_, one),) = packed("null_arguments")
    assert calls(one) == [{"command": "ls"}, {"path": "a"}]
    assert [calls(c) for _, c in packed("real_nulls_limi")] == [
        [{"env": {"DEBUG": None, "A": "1"}}], [{"body": {"x": None, "y": 1}}]
    ]  # fmt: skip
    for _, one in packed("null_schemas"):
        assert [t["function"]["parameters"]["properties"] for t in one.tools] == [
            {"command": {"type": "string"}}, {"path": {"type": "string"}}
        ]  # fmt: skip


def test_ids_decide_the_pairing_alone(packed):
    (_, again), (_, without) = packed("call_ids")
    ids = [c.id for m in again.messages for c in m.tool_calls or []]
    assert len({*ids}) == 2 and ids == [m.tool_call_id for m in again.messages if m.role == "tool"]
    assert without.messages[1].tool_calls[0].id == without.messages[2].tool_call_id


def test_what_is_no_message_is_metadata_that_no_template_sees(packed):
    (_, first), (_, second), *_ = packed("extra_columns")
    assert (first.metadata, second.metadata) == ({"task": "x"}, {})
    assert first.content_hash() == second.content_hash() and "task" not in json.dumps(first.chat())
    words = ("data.columns.messages=trajectory",)
    ((ledger, renamed),) = packed("renamed_columns", *words)
    assert ledger["status"] == "kept" and renamed.metadata["exit_status"] == "submit" and len(renamed.messages) == 6
    assert "kept as metadata: exit_status, gen_tests_correct, instance_id" in "; ".join(ledger["repairs"])
    ((ledger, text),) = packed("json_text_columns", "data.columns.tools=available_tools")
    assert ledger["status"] == "kept" and text.tools[0]["function"]["name"] == "bash"


def test_a_record_without_messages_names_the_column_that_looks_like_them():
    from data_prep.normalise.record import _column

    turns = [{"role": "user", "content": "x"}]
    assert _column({"info": {"a": 1}, "traj": turns}).startswith("write data.columns.messages=traj if")
    assert _column({"x": json.dumps(turns)}).startswith("write data.columns.messages=x if")
    assert "this record has info" in _column({"info": [1, 2]})


def test_flags_of_turns_are_weights(packed):
    for ledger, one in packed("turn_flags"):
        assert [m.weight for m in one.messages] == [None, 0, None, 1] and ledger["turns"] == 1


def test_a_thought_without_its_opening_is_read_as_the_templates_read_it(packed):
    (_, half), (_, nested) = packed("half_thought")
    assert [(m.reasoning_content, m.content) for m in half.messages if m.role == "assistant"] == [
        ("I must list the files.", "I look."), ("There is one.", "One file.")
    ]  # fmt: skip
    assert (nested.messages[1].reasoning_content, nested.messages[1].content) == ("Let me check.", "I look.")


def test_parts_are_joined_as_the_server_joins_them_for_the_template(packed):
    assert packed("parts")[2][1].messages[2].content == "a.txt b.txt"
    assert packed("parts", model="glm4.5-tiny")[2][1].messages[2].content == "a.txt b.txt", "results always by a space"


@pytest.mark.parametrize("name", KEPT)
def test_what_is_mended_needs_no_mending(packed, name):
    """A second pass over what the first one made changes nothing and names nothing."""
    from data_prep.normalise.record import Joins, normalise

    for _, one in packed(name):
        record = {"id": one.id, "messages": [m.model_dump(exclude_none=True) for m in one.messages], "tools": one.tools}
        before, repairs = json.dumps(record), []
        again = normalise(json.loads(before), Joins(), repairs)
        assert repairs == [] and {k: again[k] for k in record} == json.loads(before)


@pytest.mark.parametrize("template", OFFICIAL)
@pytest.mark.parametrize("name", KEPT)
def test_every_supervised_turn_follows_the_prompt_that_transformers_gives(reference, name, template):
    """The proof a second time, apart from the code under test, by the official templates."""
    chat = official(reference, template)
    (path,) = FOLDER.glob(f"{name}.*")
    module = source(KINDS.get(name, "openai"))
    for record in module.records(path):
        one = trajectory_options.without_thinking(read_trajectory(record, module), Data())
        if template == "qwen3-2507" and any(m.reasoning_content for m in one.messages):
            continue  # that template shows no reasoning
        turns, *_ = trajectory_options.supervised(one, Data())
        assert_proved(chat, one, chat.encode(one, turns), turns)


def made(message, **arguments):
    """A conversation of one assistant message, after a question."""
    parameters = {"type": "object", "properties": {"a": {"type": "string", "nullable": True}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    raw = json.dumps({"messages": [{"role": "user", "content": "x"}, message], "tools": tools}).encode()
    return read_trajectory(Record("here", raw, len(raw)), source("openai"))


def test_a_null_that_a_dialect_allows_stays_and_breaks_no_schema():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": None}}}
    one = made({"role": "assistant", "content": "", "tool_calls": [call]})
    assert calls(one) == [{"a": None}] and list(one.faulty_calls()) == [] and one.unjudged() == []


@pytest.mark.parametrize(("name", "key"), [("reasoning_details", "text"), ("thinking_blocks", "thinking")])
def test_a_list_of_thoughts_is_read_named_or_refused_and_never_dropped_in_silence(name, key):
    thoughts = {name: [{"type": "x", key: "I "}, {"type": "x", key: "think"}]}
    one = made({"role": "assistant", "content": "Hi.", **thoughts})
    assert one.messages[1].reasoning_content == "I think" and one.repairs == [
        f"message 1: {name} read as reasoning_content"
    ]
    beside = made({"role": "assistant", "content": "Hi.", "reasoning_content": "so", **thoughts})
    assert (
        beside.messages[1].reasoning_content == "so"
        and f"{name} left out beside reasoning_content" in beside.repairs[0]
    )
    with pytest.raises(Rejected, match="a thought without text"):
        made({"role": "assistant", "content": "Hi.", name: [{"type": "encrypted", "data": "x"}]})


def test_what_is_said_otherwise_than_in_text_is_refused_with_what_to_write():
    for field, said in (({"audio": {"id": "1"}}, "trains on text"), ({"parts": [1]}, "Gemini's form")):
        with pytest.raises(Rejected, match=said):
            made({"role": "assistant", "content": "Hi.", **field})
    raw = json.dumps({"messages": [{"role": "user", "content": "x", "loss_mask": 1}], "tools": []}).encode()
    with pytest.raises(Rejected, match="loss_mask stands at a message of role user.*leave it out there"):
        read_trajectory(Record("here", raw, len(raw)), source("openai"))


def test_a_flag_that_leaves_out_what_is_never_learned_is_left_out():
    said = [
        {"role": "user", "content": "x", "loss_weight": 0.0},
        {"role": "assistant", "content": "y", "loss_weight": 1.0},
    ]
    raw = json.dumps({"messages": said}).encode()
    one = read_trajectory(Record("here", raw, len(raw)), source("openai"))
    assert [m.weight for m in one.messages] == [None, 1]
    assert "message 0: loss_weight left out: turns of the assistant alone are learned" in one.repairs


def test_a_call_that_the_model_broke_ends_the_record_before_it_by_option(packed):
    """SGLang answers 400 to every later prompt: none of them can be what inference sends."""
    ((ledger, _),) = packed("broken_arguments")
    assert ledger["reason"].endswith("write data.broken_calls=cut to keep what comes before it")
    ((ledger, one),) = packed("broken_arguments", "data.broken_calls=cut")
    assert ledger["code"] == "no_supervised" and one is None, "here nothing comes before it"
    said = json.loads((FOLDER / "broken_arguments.jsonl").read_text())
    good = {"role": "assistant", "content": "Which?"}
    said["messages"][2:2] = [good, {"role": "user", "content": "All."}]
    reading = Reading(broken_calls=BrokenCalls.cut)
    one = read_trajectory(Record("here", json.dumps(said).encode(), 0), source("openai"), reading)
    assert [m.role for m in one.messages] == ["system", "user", "assistant", "user"]
    assert one.repairs[-1].endswith("3 messages from there on left out")


@pytest.mark.parametrize("model", ["qwen3-tiny", "glm4.5-tiny"])
def test_an_interrupted_call_is_kept_in_its_order_by_option(packed, model):
    ((ledger, _),) = packed("interrupted")
    assert ledger["reason"].endswith("write data.open_calls=keep to keep the record as it is")
    ((ledger, one),) = packed("interrupted", "data.open_calls=keep", model=model)
    assert ledger["status"] == "kept" and ledger["turns"] == 3
    assert [m.role for m in one.messages] == ["user", "assistant", "user", "tool", "assistant", "tool", "assistant"]


def test_characters_of_a_content_that_is_changed_are_refused():
    for content in ("<think>a</think>Hello world, long", [{"type": "text", "text": "Hello world"}]):
        with pytest.raises(Rejected, match="unsupervised characters"):
            made({"role": "assistant", "content": content, "unsupervised": [[0, 8]]})
