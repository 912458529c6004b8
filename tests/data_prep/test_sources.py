"""Each source maps what its table says; every repair is named."""

import contextlib
import json

import pytest

from data_prep.records import Record
from data_prep.sources import read_trajectories, read_trajectory, source
from data_prep.trajectory import Rejected
from recipes.errors import ConfigError
from tests.conftest import REPO
from tests.data_prep.recorded.support import answer, called, content, log, logged, request, text

SAMPLE = REPO / "data_prep" / "sample" / "train.jsonl"


def made(name, record):
    return read_trajectory(Record("here", json.dumps(record).encode(), 0), source(name))


def limi_record():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1, "b": None, "c": None}}}
    properties = {"a": {"type": "integer", "enum": None, "default": None}, "b": None, "c": {"enum": ["x", None]}}
    return {
        "messages": [
            {"role": "user", "content": "hi", "tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": [call], "tool_call_id": None},
            {"role": "tool", "tool_call_id": "1", "content": "x", "tool_calls": None},
            {"role": "assistant", "content": "done", "tool_calls": []},
        ],
        "tools": [
            {"type": "function", "function": {"name": "f", "parameters": {"properties": properties, "required": None}}}
        ],
    }


def test_an_unknown_source_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"data\.source=openai"):
        source("openia")
    with pytest.raises(ConfigError) as error:
        source("parquet")
    assert error.value.problem.startswith("unknown data.source 'parquet' (known: claude_code, limi, openai, ")
    assert error.value.fix == "write data.source=NAME, one of them"


def test_limi_json_lines_and_an_array_read_the_same(tmp_path):
    records = [json.loads(line) for line in SAMPLE.read_text().splitlines()]
    array = tmp_path / "limi.json"
    array.write_text(json.dumps(records, indent=1))
    assert list(read_trajectories(array, "limi")) == list(read_trajectories(SAMPLE, "limi"))
    assert len(records) == 20


def test_read_names_the_record_that_is_none(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(SAMPLE.read_text() + "5\n")
    with pytest.raises(Rejected, match=r"x\.jsonl: line 21: a record is a JSON object"):
        list(read_trajectories(path, "limi"))


def test_limi_null_filling_is_undone_and_named():
    t = made("limi", limi_record())
    assert t.messages[1].tool_calls[0].function.arguments == {"a": 1, "c": None}, "c is declared, b is not"
    parameters = t.tools[0]["function"]["parameters"]
    assert parameters == {"properties": {"a": {"type": "integer", "default": None}, "c": {"enum": ["x", None]}}}
    assert t.messages[1].content == ""
    assert t.repairs == [
        "null function.parameters.properties.a.enum removed from the tools",
        "null function.parameters.properties.b removed from the tools",
        "null function.parameters.required removed from the tools",
        "message 1: null content read as empty",
        "null argument 'b' of f removed",
    ]


def test_ids_are_kept_or_made_of_the_content():
    record = limi_record()
    identity = made("limi", record).id
    assert made("limi", dict(reversed(record.items()))).id == identity and len(identity) == 16
    assert made("limi", {"id": "mine", **record}).id == "mine"
    record["messages"][0]["content"] = "other"
    assert made("limi", record).id != identity


def test_openai_reads_what_its_table_says():
    t = made(
        "openai",
        {
            "id": "a",
            "functions": [{"name": "g", "parameters": {"type": "object"}}],
            "tools": [{"type": "function", "function": {"name": "f"}}],
            "messages": [
                {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "good"}]},
                {"role": "user", "content": "hi", "name": None},
                {
                    "role": "assistant", "content": None, "reasoning_content": "so", "refusal": None, "annotations": [],
                    "tool_calls": [{"index": 0, "id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 5}"}}],
                },
                {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "x"}]},
                {"role": "assistant", "content": "", "function_call": {"name": "g", "arguments": "{}"}},
                {"role": "function", "name": "g", "content": "y"},
                {"role": "assistant", "content": "<think>\nhm\n</think>\n\ndone", "weight": 0},
            ],
        },
    )  # fmt: skip
    assert [m.role for m in t.messages] == ["system", "user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert t.messages[0].content == "be  good", "as a server joins parts for a template that takes no lists"
    assert t.messages[2].reasoning_content == "so" and t.messages[2].tool_calls[0].function.arguments == {"a": 5}
    assert t.messages[4].tool_calls[0].id == t.messages[5].tool_call_id
    assert (t.messages[6].reasoning_content, t.messages[6].content, t.messages[6].weight) == ("hm", "done", 0)
    assert [tool["function"]["name"] for tool in t.tools] == ["f", "g"]
    assert t.repairs == [
        "message 0: role developer read as system",
        "message 0: 2 parts joined with a space between them, as SGLang does",
        "message 2: null content read as empty",
        "message 5: role function read as tool",
        "message 6: thinking moved out of the content",
        "2 missing ids of calls and results made",
    ]


def test_limi_null_for_an_optional_argument_of_another_type_is_null_filling():
    record = limi_record()
    parameters = record["tools"][0]["function"]["parameters"]
    parameters["properties"] = {
        "n": {"type": "integer"},
        "r": {"type": "integer"},
        "any": {},
        "or": {"type": ["integer", "null"]},
    }
    parameters["required"] = ["r"]
    record["messages"][1]["tool_calls"][0]["function"]["arguments"] = dict.fromkeys(("n", "r", "any", "or"))
    t = made("limi", record)
    assert t.messages[1].tool_calls[0].function.arguments == {"r": None, "any": None, "or": None}
    assert "null argument 'n' of f removed" in t.repairs


def test_limi_null_filling_is_undone_at_any_depth():
    record = limi_record()
    properties = record["tools"][0]["function"]["parameters"]["properties"]
    properties["o"] = {"type": "object", "properties": {"x": {"type": "integer"}, "default": None}}
    record["messages"][1]["tool_calls"][0]["function"]["arguments"]["o"] = {"x": 1, "y": None}
    t = made("limi", record)
    assert t.messages[1].tool_calls[0].function.arguments["o"] == {"x": 1}
    assert "null argument 'o.y' of f removed" in t.repairs
    assert t.tools[0]["function"]["parameters"]["properties"]["o"]["properties"] == {"x": {"type": "integer"}}


@pytest.mark.parametrize("name", ["limi", "openai", "requests"])
@pytest.mark.parametrize("junk", [5, "x", None, True, [], {}, [[]], [5], {"a": 5}])
def test_whatever_stands_in_a_field_the_record_is_rejected_or_kept(name, junk):
    """Never another error: one bad record must not end a run over thousands."""
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    good = {
        "limi": limi_record(),
        "openai": {"messages": said, "tools": [], "functions": []},
        "requests": log(request(content("user", text("a")), content("model", called("1"))), answer(text("b"))),
    }[name]  # fmt: skip

    def mutants(value, rebuild):
        yield rebuild(junk)
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:

            def put(new, key=key, value=value, rebuild=rebuild):
                changed = dict(value) if isinstance(value, dict) else list(value)
                changed[key] = new
                return rebuild(changed)

            yield from mutants(inner, put)

    for record in mutants(good, lambda r: r):
        with contextlib.suppress(Rejected):
            (logged if name == "requests" else made)(*([record] if name == "requests" else [name, record]))


def test_openai_reads_sharegpt_and_llama_factorys_calls():
    tools = json.dumps(
        [{"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}]
    )
    said = [
        {"from": "human", "value": "go"},
        {"from": "function_call", "value": '<think>Hm.</think>I look.\n{"name": "f", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "1"},
        {
            "from": "function_call",
            "value": '[{"name": "f", "arguments": {"a": 2}}, {"name": "f", "arguments": "{\\"a\\": 3}"}]',
        },
        {"from": "observation", "value": "2"},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "done"},
    ]
    t = made("openai", {"conversations": said, "system": "be good", "tools": tools, "source": "x"})
    assert [m.role for m in t.messages] == [
        "system", "user", "assistant", "tool", "assistant", "tool", "tool", "assistant"
    ]  # fmt: skip
    assert (t.messages[2].reasoning_content, t.messages[2].content) == ("Hm.", "I look.")
    assert [c.function.arguments for m in t.messages for c in m.tool_calls or []] == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert t.metadata == {"source": "x"} and t.tools[0]["function"]["name"] == "f"
    assert made("openai", {"messages": said, "tools": tools}).messages[-1].content == "done"


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"from": "narrator", "value": "x"}, "from is 'narrator', which is not known"),
        ({"from": "function_call", "value": "no json"}, "a function_call is JSON of name and arguments"),
    ],
)
def test_what_sharegpt_does_not_say_is_refused(message, says):
    with pytest.raises(Rejected, match=says):
        made("openai", {"conversations": [{"from": "human", "value": "go"}, message]})


def test_openai_reads_parts_of_type_and_value():
    call = {"type": "tool_call", "value": '{"name": "f", "arguments": {"a": 1}}'}
    said = [
        {"role": "user", "content": [{"type": "text", "value": "go"}]},
        {"role": "assistant", "content": [{"type": "reasoning", "value": "Hm."}, call]},
        {"role": "tool", "content": [{"type": "text", "value": "1"}]},
        {"role": "assistant", "content": [{"type": "reasoning", "value": "So."}, {"type": "text", "value": "done"}]},
    ]
    t = made("openai", {"messages": said})
    assert (t.messages[1].reasoning_content, t.messages[1].content) == ("Hm.", "")
    assert t.messages[1].tool_calls[0].function.arguments == {"a": 1}
    assert (t.messages[3].reasoning_content, t.messages[3].content) == ("So.", "done")
    with pytest.raises(Rejected, match="a part of type 'image' cannot become text"):
        made("openai", {"messages": [{"role": "user", "content": [{"type": "image", "value": "x"}]}]})
