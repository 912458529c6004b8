"""JSON that others left: every way in which it is broken has the file's name, the line, and what belongs there."""

import json
import re

import pytest

from recipes import json_file
from recipes.errors import CheckpointError, DataError

GOOD = '{\n  "a": 1,\n  "b": "ü"\n}\n'
BROKEN = {
    "empty": (b"", " is empty, and JSON in UTF-8 belongs there"),
    "blank": (b" \n\n", " is empty, and JSON in UTF-8 belongs there"),
    "cut off": (GOOD.encode()[:9], " is cut off in line 2"),
    "cut off in a text": (GOOD.encode()[:16], " is cut off in line 3"),
    "not JSON": (b'{\n  "a": 1,\n  b: 2\n}', ", line 3, column 3: Expecting property name enclosed in double quotes"),
    "two values": (b"{}\n{}", ", line 2, column 1: Extra data"),
    "a page": (b"<!DOCTYPE html>", ", line 1, column 1: Expecting value"),
    "zeros": (bytes(8), ", line 1, column 1: Expecting value"),
    "a list": (b"[1]", " holds a list, and an object belongs there"),
    "a text": (b'"a"', " holds a text, and an object belongs there"),
    "null": (b"null", " holds null, and an object belongs there"),
    "a number": (b"1.5", " holds a number, and an object belongs there"),
    "a flag": (b"true", " holds true or false, and an object belongs there"),
    "Latin-1": (GOOD.encode("latin-1"), " is not UTF-8 in line 3, and JSON in UTF-8 belongs there"),
    "UTF-16": (GOOD.encode("utf-16"), " is UTF-16, and JSON in UTF-8 belongs there"),
    "a mark": (GOOD.encode("utf-8-sig"), " begins with a byte order mark, which other readers refuse, and JSON in UTF-8"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", " is a pointer of Git LFS (`git lfs pull` brings the file)"),
    "deep": (b"[" * 100_000, ", from line 1: maximum recursion depth"),
    "a long number": (b'{"a": ' + b"1" * 5000 + b"}", ", from line 1: Exceeds the limit"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_what_belongs_there(tmp_path, name):
    path = tmp_path / "config.json"
    raw, says = BROKEN[name]
    path.write_bytes(raw)
    with pytest.raises(CheckpointError) as error:
        json_file.read_json(path, "copy it anew")
    assert error.value.problem.startswith(f"'{path}'{says}")
    assert error.value.fix == "copy it anew"


def test_a_whole_file_is_read_and_one_that_is_not_there_is_the_systems(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(GOOD)
    assert json_file.read_json(path, "") == {"a": 1, "b": "ü"}
    with pytest.raises(FileNotFoundError):
        json_file.read_json(tmp_path / "none.json", "")


def test_the_error_is_the_callers(tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text("[]")
    with pytest.raises(DataError, match="manifest.json' holds a list"):
        json_file.read_json(path, "make it again", DataError)


def test_lines_name_the_line_and_leave_out_the_one_being_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n\n{"step": 2}\n{"st')
    assert json_file.lines(path, "") == [{"step": 1}, {"step": 2}]
    for line, says in (
        ("{oops}", r", line 3, column 2: Expecting property name"),
        ("[]", r", line 3 holds a list, and an object belongs there"),
        ('{"step": 2', r" is cut off in line 3"),
    ):
        path.write_text(f'{{"step": 1}}\n\n{line}\n{{"step": 3}}\n')
        with pytest.raises(CheckpointError, match=re.escape(f"'{path}'") + says):
            json_file.lines(path, "take that line out")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({}, "has no weight_map"),
        ({"weight_map": []}, "holds other values than belong there"),
        ({"weight_map": {"a": 5}}, "holds other values than belong there"),
        ({"weight_map": None}, "holds other values than belong there"),
    ],
)
def test_what_is_picked_apart_has_the_shape_that_it_needs(tmp_path, value, says):
    path = tmp_path / "index.json"
    path.write_text(json.dumps(value))
    index = json_file.read_json(path, "")
    with pytest.raises(CheckpointError, match=says) as error, json_file.shape(path, "copy it anew"):
        [name.upper() for name in index["weight_map"].values()]
    assert error.value.problem.startswith(f"'{path}' ") and error.value.fix == "copy it anew"
