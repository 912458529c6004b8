"""The checks of an export's files: good ones pass everything, and every fault is named by the check that should."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from launch.export import export
from launch.sanity.checks import Check, Outcome
from launch.sanity.files import check as files
from launch.sanity.files import compare_worker, tensors
from launch.sanity.files import page as moved_page
from recipes.compose import compose_recipe, to_yaml
from recipes.config import Recipe
from tests.conftest import REPO
from tests.launch.recorded import hollow_base
from tests.launch.sanity import broken
from tests.launch.support import short_run

QUIET = Console(quiet=True)
MODELS = ["qwen3-tiny", "glm4.5-tiny"]
COUNT = {"qwen3-tiny": 18, "glm4.5-tiny": 20}  # of checks
STEPS = 4
SHORT = ["optim.lr=1e-3", "optim.warmup_steps=1", "cluster.gpus_per_node=1", "layout=data_parallel"]


@dataclass(frozen=True)
class Trained:
    recipe: Recipe
    hf: Path
    rates: list[float]

    @property
    def base(self) -> Path:
        return Path(self.recipe.model.checkpoint)

    def checks(self, folder: Path, written: Path) -> dict[str, Check]:
        done = files.checks(folder, self.base, self.recipe, self.rates, console=QUIET, written=written)
        return {c.name: c for c in done}


def train(root, model, seed=0, *words) -> Trained:
    """A few real steps, exported by the ranks and, from their checkpoint, by the command."""
    name = f"files-{model}-{seed}{'-'.join(re.sub(r'[^a-z0-9]', '', w) for w in words)}"
    plan, run = short_run(root, STEPS, f"model={model}", *SHORT, f"seed={seed}", f"run={name}", *words)
    export(plan.recipe, run.checkpoint(STEPS), run.root / "again", QUIET)
    return Trained(plan.recipe, run.hf, plan.summary()["steps"]["learning_rates"][:STEPS])


@pytest.fixture(scope="module")
def trained(root):
    return {model: train(root, model) for model in MODELS}


def bad(checks):
    return {n: f"{c.figure}: {c.detail}" for n, c in checks.items() if c.outcome is not Outcome.passed}


@pytest.mark.parametrize("model", MODELS)
def test_a_good_export_of_either_engine_passes_everything(trained, model, tmp_path):
    good = trained[model]
    for folder in (good.hf, good.hf.with_name("again")):
        checks = good.checks(folder, tmp_path / "moved.json")
        assert not bad(checks)
        assert len(checks) == COUNT[model]
    moved = json.loads((tmp_path / "moved.json").read_text())
    shares = {(c["kind"], c["layer"]): c["share"] for c in moved["cells"]}
    assert all(share > 0.1 for (kind, _), share in shares.items() if kind in ("q", "o", "mlp down", "experts up")), (
        shares
    )
    assert shares.get(("router bias", 1), 0) == shares.get(("MTP", 3), 0) == 0
    assert moved["limit"] == pytest.approx(2 * sum(good.rates))
    assert 0 < max(c["largest"] for c in moved["cells"]) < moved["limit"]
    assert moved_page.plot(moved).startswith('<img alt="share of elements')


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("model", MODELS)
def test_good_exports_of_other_seeds_pass(root, model, seed, tmp_path):
    good = train(root, model, seed)
    assert not bad(good.checks(good.hf, tmp_path / "moved.json"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [["engine.dtype=bf16"], ["model.mtp=drop"], ["optim.weight_decay=0.1"], ["optim.lr=6e-3"]]
)
def test_good_exports_of_other_recipes_pass(root, words, tmp_path):
    good = train(root, "glm4.5-tiny", 0, *words)
    assert not bad(good.checks(good.hf, tmp_path / "moved.json"))


CASES = [
    *(("qwen3-tiny", n) for n in broken.FAULTS | broken.TIED),
    *(
        ("glm4.5-tiny", n)
        for n in ["NaN", "a layer not updated", "gate and up swapped", "a wrong rope base", *broken.EXPERTS]
    ),
]


@pytest.mark.parametrize(("model", "name"), CASES)
def test_a_fault_is_named_by_its_check_and_all_others_are_made(trained, model, name, tmp_path):
    good, other = trained[model], trained[next(m for m in MODELS if m != model)]
    fault = broken.of(good.hf)[name]
    folder = broken.make(fault, good.hf, good.base, other.base, tmp_path / "hf")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    checks = good.checks(folder, tmp_path / "moved.json")
    found = bad(checks)
    assert checks[fault.check].outcome is Outcome.failed, found
    assert re.search(fault.says, checks[fault.check].detail), found
    # A copy that lost something shows in the manifest too, and what it lost cannot be looked at; anything else fails one check.
    along = {"manifest", "every layer moved", "tensor names"} if fault.copied else set()
    assert found.keys() - along == {fault.check} - along
    assert len(checks) == COUNT[model]
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_without_rates_nothing_is_said_of_how_far_and_swaps_are_found_all_the_same(trained, tmp_path):
    good = trained["qwen3-tiny"]
    folder = broken.make(broken.FAULTS["gate and up swapped"], good.hf, good.base, good.base, tmp_path / "hf")
    for where, outcome in ((good.hf, Outcome.passed), (folder, Outcome.failed)):
        done = files.checks(where, good.base, good.recipe, None, console=QUIET, written=tmp_path / "moved.json")
        far = next(c for c in done if c.name == "how far weights moved")
        assert far.outcome is outcome
        assert "not known" in far.limit
    assert json.loads((tmp_path / "moved.json").read_text())["limit"] is None


def test_rates_too_small_for_bf16_are_odd_and_no_fault(trained, tmp_path):
    good = trained["qwen3-tiny"]
    folder = broken.make(
        broken.FAULTS["the base instead of the export"], good.hf, good.base, good.base, tmp_path / "hf"
    )
    done = files.checks(folder, good.base, good.recipe, [1e-9], console=QUIET, written=tmp_path / "moved.json")
    assert {c.name: c.outcome for c in done if c.outcome is not Outcome.passed} == {"every layer moved": Outcome.warned}


def test_several_workers_and_many_blocks_see_what_one_does(trained, tmp_path, monkeypatch):
    good = trained["glm4.5-tiny"]
    one = good.checks(good.hf, tmp_path / "one.json")
    monkeypatch.setattr(compare_worker, "BLOCK", 1000)
    small = good.checks(good.hf, tmp_path / "small.json")
    monkeypatch.setattr(tensors, "BATCH_BYTES", 400_000)
    several = good.checks(good.hf, tmp_path / "several.json")
    assert one == small == several
    cells = [
        sorted(json.loads((tmp_path / f"{n}.json").read_text())["cells"], key=str) for n in ("one", "small", "several")
    ]
    assert cells[0] == cells[1] == cells[2]


MEMORY = """
import resource, sys
from pathlib import Path
from rich.console import Console
from launch.model.safetensors_folder import SafetensorsFolder
from launch.sanity.files import compare_worker
from launch.model.shards import read
from launch.sanity.files import tensors
from recipes.compose import from_yaml
recipe, folder = from_yaml(Path(sys.argv[1])), Path(sys.argv[2])
tensors.BATCH_BYTES = 1 << 40  # one process does it all
found = read(folder)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
seen = tensors.compare(found, SafetensorsFolder(folder), recipe.model, tensors.reach(recipe.optim, None), Console(quiet=True))
assert len(seen) == len(found.files)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_worker_s_memory_is_that_of_a_few_blocks(tmp_path):
    shape = ["hidden=1024", "ffn=3072", "layers=2", "heads=16", "kv_heads=8", "head_dim=64", "vocab=60000"]
    recipe = compose_recipe([*(f"model.{word}" for word in shape), f"model.checkpoint={tmp_path}/base"])
    hollow_base(recipe.model)
    assert max(f.stat().st_size for f in (tmp_path / "base").glob("*.safetensors")) > 150e6, "most of it one tensor"
    (tmp_path / "config.yaml").write_text(to_yaml(recipe))
    words = [tmp_path / "config.yaml", tmp_path / "base"]
    done = subprocess.run([sys.executable, "-c", MEMORY, *map(str, words)], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 50e6, f"{done.stdout} KB more"


def test_the_limit_is_the_recipe_s(trained, tmp_path):
    good = trained["qwen3-tiny"]
    strict = Trained(
        compose_recipe(["sanity.max_moved=1", f"cluster.root={good.recipe.cluster.root}"]), good.hf, [1e-5]
    )
    assert "how far weights moved" in bad(strict.checks(good.hf, tmp_path / "moved.json"))
