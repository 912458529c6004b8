"""Each source maps what its table says; every repair is named."""

import contextlib
import json

import pytest

from data_prep.records import Record
from data_prep.sources import read_trajectories, source, trajectory
from data_prep.trajectory import Rejected
from recipes.errors import ConfigError
from tests.conftest import REPO

SAMPLE = REPO / "data_prep" / "sample" / "train.jsonl"


def made(name, record):
    return trajectory(Record("here", json.dumps(record).encode(), 0), source(name))


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
    assert error.value.problem.startswith("unknown data.source 'parquet' (known: limi, openai, ")
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


def request(*contents, system="be good", tools=None):
    declared = {
        "name": "f",
        "description": "d",
        "parameters": {"type": "OBJECT", "properties": {"a": {"type": "STRING"}}},
    }
    full = {
        "system_instruction": system,
        "tools": tools or [{"functionDeclarations": [declared]}],
        "messages": [*contents],
    }
    return {"type": "api_request_full", "data": {"full_request": full}}


def answer(*parts):
    return {
        "type": "api_response_full",
        "data": {"full_response": {"candidates": [{"content": {"role": "model", "parts": [*parts]}}]}},
    }


def content(role, *parts):
    return {"role": role, "parts": [*parts]}


def text(value, **more):
    return {"text": value, **more}


def called(identity, **arguments):
    return {
        "functionCall": {"id": identity, "name": "f", "args": arguments}
        if identity
        else {"name": "f", "args": arguments}
    }


def response(identity, value):
    return {
        "functionResponse": {"id": identity, "name": "f", "response": value}
        if identity
        else {"name": "f", "response": value}
    }


def log(*events):
    return {"id": "s1", "model": "m", "created": "now", "events": [{"type": "telemetry"}, *events]}


def test_sii_cli_merges_the_requests_and_keeps_the_last_answer():
    first = [content("user", text("go"))]
    said = content("model", text("look", thought=True), text("I look."), called("1", a="x"))
    again = [
        *first,
        content("model", text("I look."), called("1", a="x")),
        content("user", response("1", {"output": "found"})),
    ]
    t = made("sii_cli", log(request(*first), answer(*said["parts"]), request(*again), answer(text("Done."))))
    assert t.id == "s1" and t.repairs == []
    assert [m.role for m in t.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert t.messages[2].reasoning_content == "look", "the thought that later requests leave out"
    assert (t.messages[2].content, t.messages[3].content, t.messages[4].content) == ("I look.", "found", "Done.")
    assert t.tools[0]["function"]["parameters"] == {"type": "object", "properties": {"a": {"type": "string"}}}


def test_sii_cli_keeps_errors_and_results_without_ids():
    t = made(
        "sii_cli",
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
    assert [m.tool_call_id for m in results] == ["call_1", "call_2"]


def test_sii_cli_keeps_the_order_of_parts():
    t = made(
        "sii_cli",
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
    assert t.repairs == ["message 1: text after a call starts a new turn"]


def test_sii_cli_says_where_a_log_has_no_last_answer():
    t = made(
        "sii_cli", log(request(content("user", text("a")), content("model", text("b")), content("user", text("c"))))
    )
    assert t.repairs == ["the log ends without an answer to its last request"]


def test_sii_cli_merges_a_history_whose_beginning_was_cut_off():
    whole = [content("user", text("a")), content("model", text("b")), content("user", text("c"))]
    t = made(
        "sii_cli",
        log(
            request(*whole),
            answer(text("d")),
            request(*whole[2:], content("model", text("d")), content("user", text("e"))),
            answer(text("f")),
        ),
    )
    assert [m.content for m in t.messages] == ["be good", "a", "b", "c", "d", "e", "f"]


def test_sii_cli_names_another_system_instruction_and_tool():
    other = [{"functionDeclarations": [{"name": "f", "description": "other"}]}]
    t = made(
        "sii_cli",
        log(
            request(content("user", text("a"))),
            answer(text("b")),
            request(
                content("user", text("a")),
                content("model", text("b")),
                content("user", text("c")),
                system="new",
                tools=other,
            ),
            answer(text("d")),
        ),
    )
    assert t.messages[0].content == "be good" and t.tools[0]["function"]["description"] == "d"
    assert t.repairs == [
        "event 3: a different system instruction; the first is used",
        "event 3: tool 'f' has a second, different declaration; the first is used",
    ]


def results_of(*responses):
    calls = [called(str(n)) for n in range(len(responses))]
    answers = [response(str(n), value) for n, value in enumerate(responses)]
    t = made(
        "sii_cli",
        log(
            request(content("user", text("a")), content("model", *calls), content("user", *answers)), answer(text("b"))
        ),
    )
    return [(m.content, m.is_error) for m in t.messages if m.role == "tool"]


def test_sii_cli_shows_all_of_a_response():
    assert results_of({"output": "o", "stderr": "e"}, {"error": ""}, {"output": "o", "error": "e"}, None, {}, "x") == [
        ('{"output": "o", "stderr": "e"}', None), ("", True), ("o\ne", True), ("null", None), ("{}", None), ("x", None),
    ]  # fmt: skip


def test_sii_cli_keeps_the_logs_order_of_results():
    asked = [content("user", text("a")), content("model", called("1"), called("2"))]
    t = made(
        "sii_cli",
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
def test_sii_cli_reads_an_answer_whole_wrapped_or_in_chunks(whole):
    t = made("sii_cli", log(request(content("user", text("a"))), {"data": whole}))
    assert t.messages[-1].content == "done" and t.repairs == []


def test_sii_cli_takes_an_answer_that_was_logged_twice_once():
    first = request(content("user", text("a")))
    t = made("sii_cli", log(first, answer(text("b")), answer(text("b")), first, answer(text("b"))))
    assert [m.content for m in t.messages] == ["be good", "a", "b"]


def test_sii_cli_names_what_it_moves_or_leaves():
    two = {"data": {"full_response": {"candidates": [{"content": {"parts": [{"text": "b"}]}}, {"content": {}}]}}}
    said = [
        content("user", text("a")),
        content("model", text("x"), text("y", thought=True), called("1")),
        content("user", text("wait")),
        content("user", response("1", "r")),
    ]
    assert made("sii_cli", log(request(*said), two)).repairs == [
        "event 2: 2 candidates; the first is used",
        "message 1: a user's text before a tool result was moved after it",
        "message 1: a thought after text was moved before it",
    ]


def test_sii_cli_gives_calls_without_an_id_one_that_is_free():
    said = [
        content("user", text("a")),
        content("model", called("call_1"), called(None)),
        content("user", response("call_1", "1"), response(None, "2")),
    ]
    t = made("sii_cli", log(request(*said), answer(text("b"))))
    assert [c.id for c in t.messages[2].tool_calls] == ["call_1", "call_2"]


def test_sii_cli_lowers_types_of_schemas_and_nothing_else():
    schema = {
        "type": "OBJECT",
        "properties": {
            "type": {"type": ["STRING", "NULL"], "default": {"type": "FILE"}},
            "l": {"type": "ARRAY", "items": {"type": "STRING"}},
        },
    }
    tools = [{"functionDeclarations": [{"name": "f", "parameters": schema}]}]
    t = made("sii_cli", log(request(content("user", text("a")), tools=tools), answer(text("b"))))
    assert t.tools[0]["function"]["parameters"]["properties"] == {
        "type": {"type": ["string", "null"], "default": {"type": "FILE"}}, "l": {"type": "array", "items": {"type": "string"}},
    }  # fmt: skip


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


@pytest.mark.parametrize("name", ["limi", "openai", "sii_cli"])
@pytest.mark.parametrize("junk", [5, "x", None, True, [], {}, [[]], [5], {"a": 5}])
def test_whatever_stands_in_a_field_the_record_is_rejected_or_kept(name, junk):
    """Never another error: one bad record must not end a run over thousands."""
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    good = {
        "limi": limi_record(),
        "openai": {"messages": said, "tools": [], "functions": []},
        "sii_cli": log(request(content("user", text("a")), content("model", called("1"))), answer(text("b"))),
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
            made(name, record)
