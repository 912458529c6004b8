import json

import pytest

from data_prep import limi
from recipes.errors import DataError
from tests.conftest import REPO

SAMPLE = REPO / "data_prep" / "sample" / "train.jsonl"
RECORD = {
    "messages": [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1, "b": None, "c": None}}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "x", "tool_calls": None},
        {"role": "assistant", "content": "done"},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {}, "c": {}}}}}],
}


def write(tmp_path, text):
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    return path


def test_json_lines_and_an_array_read_the_same(tmp_path):
    records = [json.loads(line) for line in SAMPLE.read_text().splitlines()]
    array = write(tmp_path, json.dumps(records, indent=1))
    assert list(limi.read(array)) == list(limi.read(SAMPLE))
    assert len(records) == 20


def test_null_filling_is_undone_and_named(tmp_path):
    trajectory = next(limi.read(write(tmp_path, json.dumps(RECORD))))
    assert trajectory.messages[1].tool_calls[0].function.arguments == {"a": 1, "c": None}, "c is declared, b is not"
    assert trajectory.messages[1].content == ""
    assert trajectory.repairs == ["null content read as empty", "null argument 'b' of f removed"]


def test_ids_are_kept_or_made_of_the_content(tmp_path):
    made = next(limi.read(write(tmp_path, json.dumps(RECORD)))).id
    reordered = dict(reversed(RECORD.items()))
    assert next(limi.read(write(tmp_path, json.dumps(reordered)))).id == made
    assert next(limi.read(write(tmp_path, json.dumps({"id": "mine", **RECORD})))).id == "mine"


def changed(**message):
    return json.dumps({**RECORD, "messages": [RECORD["messages"][0], message]})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (json.dumps(RECORD) + "\n{not json\n", "line 2: not JSON"),
        ("[{},\n{]", "line 2: not JSON"),
        ("[1]", "record 1: a record is an object"),
        ('{"messages": [], "tools": []}', "messages"),
        ('{"messages": [{"role": "user", "content": "hi"}], "tools": []}', "no assistant turn"),
        (changed(role="robot", content=""), "messages.1.role"),
        (changed(role="assistant", content=5), "messages.1.content"),
        (
            changed(
                role="assistant", content="", tool_calls=[{"id": "1", "function": {"name": "f", "arguments": "{}"}}]
            ),
            "arguments",
        ),
        (changed(role="tool", content="", tool_call_id="9"), "answers no open call"),
        (
            changed(role="user", content="", tool_calls=[{"id": "1", "function": {"name": "f", "arguments": {}}}]),
            "only an assistant",
        ),
    ],
)
def test_bad_records_are_refused_with_their_place(tmp_path, text, says):
    with pytest.raises(DataError) as error:
        list(limi.read(write(tmp_path, text)))
    assert says in str(error.value)
    assert "data.jsonl" in str(error.value)


def test_a_missing_file_and_wrong_bytes_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"data\.path=FILE"):
        list(limi.read(tmp_path / "none.jsonl"))
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(DataError, match="not UTF-8"):
        list(limi.read(path))
