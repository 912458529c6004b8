"""Files that others made, broken in every way: the same words, with the file's name and the line, in `make check` and `make train`."""

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from launch.cli import train
from launch.preflight import recipe_checks
from launch.run import metrics, prepare, run_folder, run_plan, which_run
from launch.weights import hf_folder, safetensors_file
from launch.weights.safetensors_folder import SafetensorsFolder
from recipes.checkpoint.checkpoint_config import check_checkpoint
from recipes.compose.recipe import compose_recipe
from recipes.errors import CheckpointError, ConfigError, LimiError

QUIET = Console(quiet=True)
JSON = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
BROKEN = {
    "empty": (lambda raw: b"", "is empty, and JSON in UTF-8 belongs there"),
    "cut off": (lambda raw: raw[: raw.index(b"\n") + 4], "is cut off in line 2"),
    "a list": (lambda raw: b"[]", "holds a list, and an object belongs there"),
    "Latin-1": (lambda raw: raw.replace(b'"', b'"\xfc', 1), "is not UTF-8 in line 2"),
    "a mark": (lambda raw: b"\xef\xbb\xbf" + raw, "begins with a byte order mark"),
}  # fmt: skip


@pytest.fixture
def base(bases, tmp_path):
    """A copy of a checkpoint, to be broken."""
    return Path(shutil.copytree(bases["qwen3-tiny"], tmp_path / "base"))


def refused(root: Path, base: Path) -> str:
    """What `train` says before anything starts, and what the red rows of `check` say, which must be the same."""
    recipe = compose_recipe([f"cluster.root={root}", f"model.checkpoint={base}"])
    with pytest.raises(LimiError) as error:
        train._embedded_plan(recipe, QUIET)
    rows = [row for row in recipe_checks.recipe_rows(recipe, lambda: prepare.packed(recipe, QUIET)) if row.failed]
    # `train` may end at the first red row, or with the table of all that it has looked at.
    (found,), (fix,) = {row.figure for row in rows}, {row.fix for row in rows}
    assert found in error.value.problem, "one fault, one text"
    assert fix in str(error.value)
    return f"{found}; {fix}"


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_file_of_a_checkpoint_is_named(root, base, name, fault):
    path = base / name
    spoil, says = BROKEN[fault]
    path.write_bytes(spoil(path.read_bytes()))
    text = refused(root, base)
    assert text.startswith(f"'{path}' {says}")
    assert text.endswith("; copy it anew, or write model.checkpoint=FOLDER of a whole checkpoint")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (b"{% for m in messages %}\n{{ m.content }", "', line 2: unexpected '}'"),
        (b"{{ a }}\n{% for m in messages %}", "', line 2: Unexpected end of template."),
        (b"{{ messages\xff }}", "' is not UTF-8 in line 1, and a chat template belongs there"),
        (b"{{ nothing.at.all }}", "': the chat template fails: 'nothing' is undefined"),
    ],
)
def test_a_broken_chat_template_is_named_with_its_line(root, base, template, says):
    path = base / "chat_template.jinja"
    path.write_bytes(template)
    assert refused(root, base).startswith(f"'{path}{says}")


def test_a_chat_template_inside_the_tokenizers_settings_is_named_with_them(root, base):
    (base / "chat_template.jinja").unlink()
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "{% if %}"}))
    assert refused(root, base).startswith(f"'{path}', line 1: Expected an expression")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": "2"}, 'num_hidden_layers is "2", the recipe says 4'),
        ({"num_hidden_layers": [2]}, "num_hidden_layers is [2], the recipe says 4"),
        ({"layer_types": 5}, "layer_types holds 5, only full_attention can be trained"),
        (
            {"layer_types": [["full_attention"]]},
            'layer_types holds ["full_attention"], only full_attention can be trained',
        ),
        ({"rope_parameters": "yarn"}, "rope_parameters is 'yarn', only null or an object can be read"),
    ],
)
def test_a_value_of_another_kind_is_named_and_never_offered_as_an_override(base, change, says):
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError) as error:
        check_checkpoint(compose_recipe([f"model.checkpoint={base}"]).model)
    assert error.value.problem == f"'{path}' is not the model of the recipe:\n  {says}"
    assert error.value.fix == "write model.checkpoint=FOLDER of a qwen3-tiny"


INDEX = {
    "cut off": (b'{"weight_map": {"a"', "is cut off in line 1"),
    "a list": (b"[]", "holds a list, and an object belongs there"),
    "no map": (b"{}", "has no weight_map"),
    "a map of numbers": (b'{"weight_map": {"a": 5}}', "holds other values than belong there"),
    "a path": (b'{"weight_map": {"a": "../b.safetensors"}}', "holds other values than belong there"),
}


@pytest.mark.parametrize("fault", INDEX)
def test_a_broken_index_is_named(base, fault):
    path = base / hf_folder.INDEX
    raw, says = INDEX[fault]
    path.write_bytes(raw)
    with pytest.raises(CheckpointError) as error:
        _ = SafetensorsFolder(base).files
    assert str(error.value).startswith(f"'{path}' {says}")


def header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + bytes(64)


SHARDS = {
    "empty": (b"", "has 0 bytes and its header alone 8: it was cut off"),
    "three bytes": (b"abc", "has 3 bytes and its header alone"),
    "cut off": (header(b"{}")[:9], "has 9 bytes and its header alone 10: it was cut off"),
    "not JSON": (header(b"{oops}"), "cannot be read: "),
    "not UTF-8": (header(b'{"\xff": 1}'), "cannot be read: "),
    "a list": (header(b"[]"), "has a list for a header, and an object belongs there"),
    "a tensor without a shape": (header(b'{"a": {"dtype": "F32", "data_offsets": [0, 4]}}'), "has no shape"),
    "one offset": (header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}'), "holds other values"),
    "offsets that go back": (header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}'), "holds other values"),
    "a tensor of a number": (header(b'{"a": 5}'), "holds other values"),
    "a page": (b"<!DOCTYPE html>" * 9, "and its header alone"),
}  # fmt: skip


@pytest.mark.parametrize("fault", SHARDS)
def test_a_broken_shard_is_named(tmp_path, fault):
    path = tmp_path / "model.safetensors"
    raw, says = SHARDS[fault]
    path.write_bytes(raw)
    with pytest.raises(CheckpointError) as error:
        safetensors_file.entries(path)
    assert str(error.value).startswith(f"'{path}' ") and says in str(error.value)
    assert "copy it anew" in error.value.fix


RUN = {  # a run's own file, what somebody made of it, and what is said
    "plan cut off": ("plan.json", '{\n"steps": ', "is cut off in line 2"),
    "plan of another version": ("plan.json", "{}", "has no data"),
    "plan with another kind": ("plan.json", '{"data": 5, "heldout": null}', "holds other values than belong there"),
    "metrics broken": ("metrics.jsonl", '{"step": 0, "heldout_loss": 1.0}\n{oops\n', ", line 2, column 2: "),
    "metrics without a step": ("metrics.jsonl", '{"loss": 1.0}\n', "has no step"),
    "metrics of texts": ("metrics.jsonl", '{"step": "1", "heldout_loss": 1.0}\n', "holds other values"),
    "record cut off": ("checkpoints/step_000001/limi.json", '{"step": 1', "is cut off in line 1"),
    "record of another version": ("checkpoints/step_000001/limi.json", '{"step": 1}', "has no fixed"),
    "record with another kind": ("checkpoints/step_000001/limi.json", '{"step": [], "fixed": {}, "files": {}}', "holds other values"),
}  # fmt: skip


@pytest.mark.parametrize("fault", RUN)
def test_a_broken_file_of_a_run_is_named(tmp_path, fault):
    name, text, says = RUN[fault]
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    readers = {
        "plan.json": run_plan.of_run,
        "metrics.jsonl": lambda root: metrics.read_metrics(root / metrics.NAME),
        "limi.json": lambda root: run_folder.read_record(root / "checkpoints" / "step_000001"),
    }
    with pytest.raises(CheckpointError) as error:
        readers[path.name](tmp_path)
    assert error.value.problem.startswith(f"'{path}'") and says in error.value.problem
    assert error.value.fix


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "holds a list, and an object belongs there; bring that file back as it was"),
        ("{}", "has no steps; bring that file back as it was"),
        ('{"steps": 5}', "holds other values than belong there"),
    ],
)
def test_an_export_of_a_run_whose_plan_is_broken_is_refused_by_name(tmp_path, text, says):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"plan.json' {says}"):
        which_run.target(tmp_path, 1)
