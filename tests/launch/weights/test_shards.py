"""What the headers of a folder's files say, whole and broken."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.weights import safetensors_file
from launch.weights.hf_folder import INDEX
from launch.weights.safetensors_file import Entry
from launch.weights.shards import SINGLE, read_shards
from recipes.errors import CheckpointError
from tests.conftest import REPO


def write(path, **shapes):
    safetensors_file.create(path, {name: Entry("BF16", shape, 0, 2 * shape[0]) for name, shape in shapes.items()})


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "one.safetensors", a=(2,), b=(4,))
    write(tmp_path / "two.safetensors", c=(6,))
    index(tmp_path, a="one", b="one", c="two")
    return tmp_path


def index(folder, **files):
    weight_map = {tensor: f"{file}.safetensors" for tensor, file in files.items()}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 24}, "weight_map": weight_map}))


def test_a_whole_folder(folder):
    there = read_shards(folder)
    assert {n: (e.dtype, e.shape) for n, e in there.entries.items()} == {
        "a": ("BF16", (2,)), "b": ("BF16", (4,)), "c": ("BF16", (6,))
    }  # fmt: skip
    assert (there.total, there.faults, there.beside) == (24, (), {})
    assert read_shards(folder, alone=True) == there


def faults(folder, **kwargs):
    return [fault.replace(str(folder), "F") for fault in read_shards(folder, **kwargs).faults]


def beside(folder, **kwargs):
    return read_shards(folder, **kwargs).beside


def test_files_that_are_missing_cut_off_or_too_long_are_named(folder):
    path = folder / "one.safetensors"
    whole = path.read_bytes()
    path.unlink()
    assert faults(folder) == ["one.safetensors is missing"]
    path.write_bytes(whole[:-1])
    assert faults(folder) == [
        f"'F/one.safetensors' has {len(whole) - 1} bytes, and b ends at {len(whole)}; copy it anew"
    ]
    path.write_bytes(whole + b"x")
    assert faults(folder) == [
        f"'F/one.safetensors' has {len(whole) + 1} bytes, and its tensors end at {len(whole)}; copy it anew"
    ]
    path.write_bytes(b"\0" * 100)  # room that a download took and did not fill
    assert faults(folder)[0].startswith("'F/one.safetensors' cannot be read: ")
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "its header alone" in faults(folder)[0]
    path.write_bytes((2).to_bytes(8, "little") + b"[]")
    assert "has a list for a header, and an object belongs there" in faults(folder)[0]


@pytest.mark.parametrize("offsets", [[0, 6], [6, 10]])
def test_bytes_between_tensors_or_in_two_of_them_are_refused_as_safetensors_does(tmp_path, offsets):
    from safetensors import SafetensorError, safe_open

    of = {"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}
    of["b"] = {"dtype": "BF16", "shape": [(offsets[1] - offsets[0]) // 2], "data_offsets": offsets}
    text = json.dumps(of).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * offsets[1])
    with pytest.raises(SafetensorError), safe_open(path, "np"):
        pass
    with pytest.raises(CheckpointError, match="b begins at byte"):
        safetensors_file.entries(path)


def test_what_the_index_and_the_files_say_otherwise_is_named_once_for_two_files(folder):
    index(folder, a="two", b="two", c="two")
    assert faults(folder) == ["a and 1 more are not in two.safetensors, where the index has them"]
    assert beside(folder) == {"one.safetensors": "a and 1 more are in one.safetensors, and the index does not say so"}
    index(folder, a="one", c="two")
    assert faults(folder) == ["b is in one.safetensors, and the index does not say so"]
    index(folder, a="one", b="one", c="two")
    shutil.copyfile(folder / "one.safetensors", folder / "three.safetensors")
    says = "a and 1 more are in two shards, three.safetensors and one.safetensors"
    assert (faults(folder), beside(folder)) == ([], {"three.safetensors": says})
    (folder / "three.safetensors").write_bytes(b"")
    assert faults(folder) == [] and "its header alone" in beside(folder)["three.safetensors"]
    write(folder / "one.safetensors", a=(2,), b=(4,), c=(6,))
    assert faults(folder) == ["c is in two shards, one.safetensors and two.safetensors"]


def test_one_file_needs_no_index_where_it_is_the_whole_checkpoint(folder):
    (folder / INDEX).unlink()
    assert faults(folder, alone=True) == faults(folder), "which of two files is the checkpoint?"
    (folder / "one.safetensors").rename(folder / SINGLE)
    (folder / "two.safetensors").unlink()
    assert faults(folder)[0].startswith(f"{INDEX} cannot be read: ")
    assert (faults(folder, alone=True), [*read_shards(folder, alone=True).entries]) == ([], ["a", "b"])
    write(folder / "adapter_model.safetensors", lora=(2,))
    says = f"lora is in adapter_model.safetensors, beside {SINGLE}"
    assert (faults(folder, alone=True), beside(folder, alone=True)) == ([], {"adapter_model.safetensors": says})


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "one.safe', "\xff"])
def test_an_index_of_another_kind_is_a_fault(folder, text):
    (folder / INDEX).write_text(text, encoding="latin-1")
    there = read_shards(folder)
    assert there.faults[0].startswith(f"{INDEX} cannot be read: ")
    assert there.files.keys() == {"a", "b", "c"}


def test_an_index_may_leave_out_the_total(folder):
    text = json.loads((folder / INDEX).read_text())
    for metadata in ({}, None):
        (folder / INDEX).write_text(json.dumps(text | {"metadata": metadata}))
        assert (read_shards(folder).total, read_shards(folder).faults) == (None, ())


def test_it_needs_neither_torch_nor_megatron():
    script = "import sys, launch.weights.shards; sys.exit(any(m in sys.modules for m in ('torch', 'megatron', 'ray')))"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(REPO)).returncode == 0
