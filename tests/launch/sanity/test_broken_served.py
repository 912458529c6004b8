"""Broken exports on the real server: each is named by the check of its files and by what it does, and all other checks are made."""

import json
import re
import shutil
import sys
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.files import sha256
from tests.launch.sanity import broken
from tests.launch.support import limi, recipe_of, while_it_moves

pytestmark = pytest.mark.slow

SERVED = {
    "served", "held-out loss", "chat template", "calls on trained prompts", "stop token", "calls per turn", "no marks in text",
    "thinking apart", "no repetition", "same language", "streaming", "closed loop", "loop protection", "the base on trained prompts",
}  # fmt: skip
# {(model, fault): checks of the server that fail too}, and "server" alone where it cannot go on.
CASES = {
    ("qwen3-tiny", "a wrong chat template"): {"chat template", "calls on trained prompts", "closed loop"},
    ("qwen3-tiny", "a wrong EOS"): set(),  # generation_config.json has the right ones, and SGLang stops at either's
    ("qwen3-tiny", "gate and up swapped"): {"held-out loss", "calls on trained prompts", "closed loop"},
    ("qwen3-tiny", "a wrong rope base"): {"held-out loss", "calls on trained prompts", "closed loop"},
    ("qwen3-tiny", "a missing tensor"): {"held-out loss"},  # SGLang takes ones for the last norm, and says nothing
    ("qwen3-tiny", "NaN"): {"held-out loss", "server"},
    ("qwen3-tiny", "a truncated shard"): {"server"},
    ("glm4.5-tiny", "experts shuffled"): {"held-out loss"},  # most calls come out right all the same
}


@pytest.fixture(scope="module")
def trained(root):
    """The folder of one good run of each model, trained where it is first asked for."""
    runs = {}

    def run(model):
        if model not in runs:
            done = limi("train", f"model={model}", f"cluster.root={root}", f"run=served-{model}")
            assert done.returncode == 0, done.stdout + done.stderr
            runs[model] = root / "runs" / f"served-{model}"
        return runs[model]

    return run


def copy_of(run, name):
    """A run of this name with the records of another, for an export to be put into."""
    copy = run.with_name(name)
    copy.mkdir()
    for record in ("config.yaml", "plan.json", "metrics.jsonl"):
        shutil.copyfile(run / record, copy / record)
    shutil.copytree(run / "checkpoints", copy / "checkpoints")
    return copy


def base_of(root, model):
    return Path(recipe_of(root, f"model={model}")[0].model.checkpoint)


def sanity(*words):
    """What the command said; no SGLang of the export is left."""
    done = limi("sanity", *words)
    assert "Traceback" not in done.stdout + done.stderr.partition("; the end of ")[0], done.stderr
    named = [w.partition("=")[2] for w in words if w.startswith(("run=", "checkpoint="))]
    assert not [p for p in psutil.process_iter() if serves(p, named)]
    return done


def serves(process, named):
    """Whether it is a server of an export of such a name."""
    try:
        line = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return "sglang" in line and any(name in line for name in named)


def found_in(folder):
    return {c["name"]: c for c in json.loads((folder / "sanity.json").read_text())}


def failed(found):
    return {name for name, c in found.items() if c["outcome"] == "fail"}


@pytest.mark.parametrize(("model", "name"), CASES)
def test_a_broken_export_is_caught_by_its_files_and_by_what_it_does(trained, root, model, name):
    good = trained(model)
    fault = broken.of(good / "hf")[name]
    run = copy_of(good, f"broken-{model}-{name.replace(' ', '-')}")
    other = base_of(root, "glm4.5-tiny" if model == "qwen3-tiny" else "qwen3-tiny")
    broken.make(fault, good / "hf", base_of(root, model), other, run / "hf")
    done = sanity(f"run={run.name}", f"cluster.root={root}", "sanity.prompts=24")
    found, noticed = found_in(run), CASES[model, name]
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(fault.says, found[fault.check]["detail"]), found[fault.check]
    assert failed(found) >= {fault.check} | noticed
    for check in failed(found):
        assert f"\n{check}: " in done.stderr, "every failed check is named"
    whole = found_in(good)
    expected = whole.keys() if "server" not in noticed else whole.keys() - {n for n in whole if n not in found}
    assert found.keys() - {"server"} == expected
    assert ("server" in found) == ("server" in noticed)
    assert "a check failed" in (run / "report.html").read_text()


def test_a_good_export_passes_by_run_and_by_folder_and_is_not_changed(trained, root, tmp_path):
    good = trained("qwen3-tiny")
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (good / "hf").iterdir()}
    run = copy_of(good, "good-again")
    shutil.copytree(good / "hf", run / "hf")
    copied = {p.name: p.read_bytes() for p in (run / "hf").iterdir()}
    for words, folder in (
        ([f"run={run.name}", f"cluster.root={root}"], run),
        ([f"checkpoint={good / 'hf'}"], good),
    ):
        done = sanity(*words)
        assert done.returncode == 0, done.stdout + done.stderr
        assert found_in(folder).keys() >= SERVED and not failed(found_in(folder))
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (good / "hf").iterdir()} == before
    assert {p.name: p.read_bytes() for p in (run / "hf").iterdir()} == copied


def test_a_broken_folder_fails_by_its_path_and_is_not_changed(trained, root, tmp_path):
    good, base = trained("qwen3-tiny"), base_of(root, "qwen3-tiny")
    folder = broken.make(broken.FAULTS["a wrong rope base"], good / "hf", base, base, tmp_path / "bad")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    done = sanity(
        f"checkpoint={folder}", "model=qwen3-tiny", f"cluster.root={root}", "run=broken-folder", "sanity.prompts=16"
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "\nrope: " in done.stderr and "\ncalls on trained prompts: " in done.stderr
    found = found_in(root / "sanity" / "broken-folder")
    assert "not known" in found["held-out loss"]["limit"], "no trainer's figure lies beside it"
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def without_stop_tokens(packed):
    """The packed data with the last token of every span not supervised."""
    table = pq.read_table(packed.folder / "sequences.parquet")
    cut = [[edge - n % 2 for n, edge in enumerate(spans)] for spans in table["loss_spans"].to_pylist()]
    place = table.column_names.index("loss_spans")
    column = pa.array(cut, pa.list_(pa.int32()))
    pq.write_table(table.set_column(place, "loss_spans", column), packed.folder / "sequences.parquet")
    digests = {n: sha256(packed.folder / n) for n in packed.manifest["files"]}
    (packed.folder / "manifest.json").write_text(json.dumps({**packed.manifest, "files": digests}))


def test_a_stop_token_that_was_never_trained_is_a_runaway_and_named(tmp_path):
    data = recipe_of(tmp_path)[1]
    shutil.copytree(data.folder, tmp_path / "right")
    without_stop_tokens(data)
    words = [sys.executable, "tests/launch/train_only.py", f"cluster.root={tmp_path}", "run=runaway", "optim.epochs=40"]
    trained = while_it_moves(words)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    shutil.rmtree(data.folder)
    shutil.move(tmp_path / "right", data.folder)
    done = sanity("run=runaway", f"cluster.root={tmp_path}", "sanity.prompts=16")  # its answers are long
    assert done.returncode == 1, done.stdout + done.stderr
    found = found_in(tmp_path / "runs/runaway")
    assert "\nstop token: " in done.stderr and "(length)" in found["stop token"]["detail"], found
    assert int(found["stop token"]["figure"].split()[0]) < 20
    assert found["chat template"]["outcome"] == "pass", "the prompts are right"
    assert found.keys() >= SERVED
