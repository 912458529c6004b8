"""The checks of an export's files: good ones pass everything, and every fault is named by the check that should."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from rich.console import Console

from launch.checks import Check, Outcome
from launch.export.export import export_checkpoint
from launch.sanity.files import file_checks as files
from launch.sanity.files import moved_plot as moved_page
from launch.sanity.tensors import compare_worker, tensor_values
from recipes.compose.recipe import compose_recipe, to_yaml
from recipes.config import Recipe
from tests.conftest import REPO
from tests.launch.recorded import hollow_base
from tests.launch.sanity import broken
from tests.launch.support import short_run

pytestmark = pytest.mark.run

QUIET = Console(quiet=True)
MODELS = ["qwen3-tiny", "glm4.5-tiny"]
COUNT = {"qwen3-tiny": 20, "glm4.5-tiny": 22}  # of checks
STEPS = 4
SHORT = ["optim.warmup_steps=1", "cluster.gpus_per_node=1", "layout=data_parallel"]
RATE = 6e-3  # of the tiny models' recipe


@dataclass(frozen=True)
class Trained:
    recipe: Recipe
    hf: Path
    rates: list[float]
    checkpoint: Path | None

    @property
    def base(self) -> Path:
        return Path(self.recipe.model.checkpoint)

    @property
    def alone(self) -> "Trained":
        """As an export of which nothing is known but its base."""
        return replace(self, checkpoint=None)

    def checks(self, folder: Path, written: Path) -> dict[str, Check]:
        done = files.file_checks(
            folder, self.base, self.recipe, self.rates, self.checkpoint, console=QUIET, written=written
        )
        return {c.name: c for c in done}


def train(root, model, seed=0, *words) -> Trained:
    """A few real steps, exported by the ranks and, from their checkpoint, by the command."""
    name = f"files-{model}-{seed}{'-'.join(re.sub(r'[^a-z0-9]', '', w) for w in words)}"
    plan, run = short_run(root, STEPS, f"model={model}", *SHORT, f"seed={seed}", f"run={name}", *words)
    checkpoint = run.checkpoint(STEPS)
    export_checkpoint(plan.recipe, checkpoint, run.root / "again", QUIET)
    rates = plan.summary()["steps"]["learning_rates"][:STEPS]
    return Trained(plan.recipe, run.hf, rates, checkpoint)


@pytest.fixture(scope="module")
def trained(root):
    return {model: train(root, model) for model in MODELS}


@pytest.fixture(scope="module")
def fast(root):
    """Trained at so many times the recipe's rate, where it is first asked for."""
    runs = {}

    def run(model, times):
        if (model, times) not in runs:
            runs[model, times] = train(root, model, 0, f"optim.lr={RATE * times:g}")
        return runs[model, times]

    return run


def bad(checks):
    return {n: f"{c.figure}: {c.detail}" for n, c in checks.items() if c.outcome is not Outcome.passed}


@pytest.mark.run
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
# What a fault of the tensors may show in beside its own check.
TENSORS = {broken.TRAINED, broken.PLACES, "how far weights moved"}


@pytest.mark.run
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
    # A copy that lost something shows in the manifest too, and what it lost cannot be looked at.
    along = {"manifest", "every layer moved", "tensor names"} if fault.copied else set()
    assert found.keys() - along - TENSORS == {fault.check} - along - TENSORS
    assert len(checks) == COUNT[model]
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


EVERY = [(model, times) for model in MODELS for times in (1, 5, 30)]


@pytest.mark.parametrize(
    ("model", "times"), [pytest.param(*case, marks=pytest.mark.slow if case[1] > 1 else []) for case in EVERY]
)
def test_a_fault_is_caught_by_its_check_at_any_rate_and_a_good_export_passes(fast, bases, model, times, tmp_path):
    """Each of them, beside the trainer's checkpoint; in another's place beside the base alone too, or it is said that it cannot
    be told."""
    good, other = fast(model, times), bases[next(m for m in MODELS if m != model)]
    assert not bad(good.checks(good.hf, tmp_path / "moved.json"))
    alone = good.alone.checks(good.hf, tmp_path / "moved.json")
    assert bad(alone).keys() == {broken.TRAINED, broken.PLACES}
    assert {alone[name].outcome for name in (broken.TRAINED, broken.PLACES)} == {Outcome.warned}
    told = 0
    for name, fault in broken.of(good.hf).items():
        folder = broken.make(fault, good.hf, good.base, other, tmp_path / name)
        checks = good.checks(folder, tmp_path / "moved.json")
        assert checks[fault.check].outcome is Outcome.failed, name
        assert re.search(fault.says, checks[fault.check].detail), (name, checks[fault.check])
        if fault.by_base is None:
            continue
        places = good.alone.checks(folder, tmp_path / "moved.json")[broken.PLACES]
        assert places.outcome is not Outcome.passed, (name, places)
        if places.outcome is Outcome.failed:
            assert re.search(fault.by_base, places.detail), (name, places)
            told += 1
        else:
            assert "cannot be told" in places.figure and times == 30, (name, places)
    assert told or times == 30


@pytest.mark.run
def test_queries_and_keys_of_one_shape_that_are_swapped_are_found(root, tmp_path):
    good = train(root, "qwen3-tiny", 0, "model.kv_heads=4", f"model.checkpoint={root}/models/as-many-keys")
    folder = broken.make(
        broken.misplaced("", "", broken.swap(broken.Q_PROJ, broken.K_PROJ)),
        good.hf,
        good.base,
        good.base,
        tmp_path / "hf",
    )
    for known, name in ((good, broken.TRAINED), (good.alone, broken.PLACES)):
        check = known.checks(folder, tmp_path / "moved.json")[name]
        assert check.outcome is Outcome.failed
        assert re.search(r"q_proj\.weight is the \w+'s .*k_proj\.weight \(swapped\)", check.detail)


@pytest.mark.run
def test_without_rates_nothing_is_said_of_how_far_and_swaps_are_found_all_the_same(trained, tmp_path):
    good = replace(trained["qwen3-tiny"].alone, rates=None)
    folder = broken.make(broken.FAULTS["gate and up swapped"], good.hf, good.base, good.base, tmp_path / "hf")
    for where, outcome in ((good.hf, Outcome.warned), (folder, Outcome.failed)):
        checks = good.checks(where, tmp_path / "moved.json")
        assert checks[broken.PLACES].outcome is outcome
        assert checks["how far weights moved"].outcome is Outcome.passed
        assert checks["how far weights moved"].limit == "shown; the rates are not known"
    assert json.loads((tmp_path / "moved.json").read_text())["limit"] is None


@pytest.mark.run
def test_rates_too_small_for_bf16_are_odd_and_no_fault(trained, tmp_path):
    good = trained["qwen3-tiny"]
    folder = broken.make(
        broken.FAULTS["the base instead of the export"], good.hf, good.base, good.base, tmp_path / "hf"
    )
    checks = replace(good.alone, rates=[1e-9]).checks(folder, tmp_path / "moved.json")
    outcomes = {name: c.outcome for name, c in checks.items() if c.outcome is not Outcome.passed}
    assert outcomes == {"every layer moved": Outcome.warned, broken.TRAINED: Outcome.warned}


@pytest.mark.run
def test_several_workers_and_many_blocks_see_what_one_does(trained, tmp_path, monkeypatch):
    good = trained["glm4.5-tiny"]
    one = good.checks(good.hf, tmp_path / "one.json")
    monkeypatch.setattr(compare_worker, "BLOCK", 1000)
    small = good.checks(good.hf, tmp_path / "small.json")
    monkeypatch.setattr(tensor_values, "BATCH_BYTES", 400_000)
    several = good.checks(good.hf, tmp_path / "several.json")
    assert one == small == several
    cells = [
        sorted(json.loads((tmp_path / f"{n}.json").read_text())["cells"], key=str) for n in ("one", "small", "several")
    ]
    assert cells[0] == cells[1] == cells[2]


def test_a_worker_s_memory_is_that_of_a_few_blocks(tmp_path):
    shape = ["hidden=1024", "ffn=3072", "layers=2", "heads=16", "kv_heads=8", "head_dim=64", "vocab=60000"]
    recipe = compose_recipe([*(f"model.{word}" for word in shape), f"model.checkpoint={tmp_path}/base"])
    hollow_base(recipe.model)
    assert max(f.stat().st_size for f in (tmp_path / "base").glob("*.safetensors")) > 150e6, "most of it one tensor"
    (tmp_path / "config.yaml").write_text(to_yaml(recipe))
    words = [tmp_path / "config.yaml", tmp_path / "base"]
    command = [sys.executable, "-m", "tests.launch.sanity.compare_alone", *map(str, words)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 50e6, f"{int(done.stdout) / 1e6:.0f} MB more"


@pytest.mark.run
def test_the_limit_is_the_recipe_s(trained, tmp_path):
    good = trained["qwen3-tiny"]
    strict = Trained(
        compose_recipe(["sanity.max_moved=1", f"cluster.root={good.recipe.cluster.root}"]), good.hf, [1e-5], None
    )
    assert "how far weights moved" in bad(strict.checks(good.hf, tmp_path / "moved.json"))
