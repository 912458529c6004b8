import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import records
from data_prep.trajectory import Rejected
from recipes.errors import DataError

VALUES = [{"a": 1}, [1, [2]], "te,xt]", 12.5, None, {"ü": "]["}, 7]


def raw(path):
    return [json.loads(r.raw) for r in records.json_records(path)]


@pytest.fixture
def write(tmp_path):
    def written(data):
        path = tmp_path / "data.json"
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    return written


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 20])
def test_an_array_reads_the_same_whatever_the_chunk(write, monkeypatch, indent, chunk):
    monkeypatch.setattr(records, "_CHUNK", chunk)
    assert raw(write(" \n" + json.dumps(VALUES, indent=indent, ensure_ascii=False) + "\n")) == VALUES


ROWS = [{"a": n, "text": "ü" * n, "none": None} for n in range(200)]


@pytest.mark.parametrize("form", ["lines", "array"])
@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_compressed_files_read_as_they_were_and_count_their_own_bytes(write, form, compression):
    text = json.dumps(ROWS) if form == "array" else "\n".join(map(json.dumps, ROWS))
    path = write(
        pa.compress(text.encode(), compression, asbytes=True) if compression == "zstd" else gzip.compress(text.encode())
    )
    assert raw(path) == ROWS
    sizes = [r.size for r in records.json_records(path)]
    assert min(sizes) >= 0 and sum(sizes) <= path.stat().st_size


def test_parquet_is_read_row_by_row(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_BATCH", 7)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "x.parquet")
    assert raw(tmp_path / "x.parquet") == ROWS
    assert [r.place for r in records.json_records(tmp_path / "x.parquet")][:2] == ["row 1", "row 2"]
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="a Parquet file that cannot be read"):
        raw(tmp_path / "x.parquet")


def test_a_folder_is_its_files_by_name_whatever_they_are(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS[:2]), tmp_path / "b.parquet")
    (tmp_path / "a.jsonl").write_text('{"a": 7}\n')
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(b'[{"a": 8}]'))
    (tmp_path / "notes.txt").write_text("no records")
    assert [r["a"] for r in raw(tmp_path)] == [7, 0, 1, 8]
    assert next(records.json_records(tmp_path)).place == "a.jsonl, line 1"
    assert [f.name for f in records.files_of(tmp_path)] == ["a.jsonl", "b.parquet", "c.json.gz"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no file that ends in"):
        raw(tmp_path / "empty")


def test_an_archive_is_named(write):
    with pytest.raises(DataError, match="is a zip archive"):
        raw(write(b"PK\x03\x04 and more"))


def test_lines_and_an_array_read_the_same(write):
    lines = "\r\n\n".join(json.dumps(v) for v in VALUES if isinstance(v, dict))
    assert raw(write("\ufeff" + lines)) == [v for v in VALUES if isinstance(v, dict)]
    assert [r.place for r in records.json_records(write(lines))] == ["line 1", "line 3"]


@pytest.mark.parametrize("text", ["", " \n ", "[]", " [ ] \n"])
def test_nothing_is_nothing(write, text):
    assert raw(write(text)) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1, 2", "ends after record 2 without its ']'"),
        ("[1 2]", "'2' where one of ',]' belongs"),
        ("[1,]", "record 2: not JSON"),
        ("[{]", "record 1: not JSON"),
        ("[1]x", "text after the array's ']': 'x'"),
        ("[1]\n" + " " * 50 + "[2]", "text after the array's ']'"),
        (b'["\xff"]', "not UTF-8"),
        ("[" * 3000, "cannot be read: maximum recursion depth"),
    ],
)
def test_a_broken_array_is_an_error(write, text, says):
    with pytest.raises(DataError) as error:
        raw(write(text))
    assert says in str(error.value) and "data.json" in str(error.value)


def test_a_surrogate_pair_is_a_character_and_half_a_one_reaches_the_check(write):
    assert raw(write('["\\ud83d\\ude00"]')) == ["😀"]
    (record,) = records.json_records(write('["\\ud83d"]'))
    with pytest.raises(Rejected, match="lone surrogate"):
        records.parse(record.raw)


def test_a_byte_order_mark_alone_is_no_record(write):
    assert raw(write("\ufeff\n\n{}\n")) == [{}]


def test_a_folder_is_its_files_and_those_below_it_by_path(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / ".cache").mkdir()
    for name in ("b.json", "a.json", "c.txt", "d/a.jsonl", ".cache/a.json"):
        (tmp_path / name).write_text(f'"{name}"')
    assert [r.place for r in records.json_records(tmp_path)] == [
        "a.json, line 1",
        "b.json, line 1",
        "d/a.jsonl, line 1",
    ]


def test_a_document_of_several_lines_is_one(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"a": [1, 2]}, indent=1))
    (document,) = records.documents(path)
    assert document.place == "a.json" and json.loads(document.raw) == {"a": [1, 2]}
    path.write_text('{"a": 1}\n{"a": \n')
    assert [d.place for d in records.documents(path)] == ["line 1", "line 2"]
    path.write_bytes(gzip.compress(json.dumps({"a": [1, 2]}, indent=1).encode()))
    assert [json.loads(d.raw) for d in records.documents(path)] == [{"a": [1, 2]}]


@pytest.mark.parametrize(
    "text",
    [
        '{"a": NaN}',
        '{"a": 1, "a": 1}',
        '{"b": {"a": 1, "a": 1}}',
        "{",
        "\udcff",
        "[1e999]",
        f"[{'9' * 5000}]",
        "[" * 65 + "]" * 65,
        '["a\\u0000"]',
    ],
)
def test_parse_refuses_what_json_is_not(text):
    with pytest.raises(Rejected):
        records.parse(text.encode("utf-8", "surrogateescape"))
