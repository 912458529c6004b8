"""What the checks of an export's files tell at several rates: `python -m tests.launch.sanity.told` prints the table.

Both tiny models are trained at 1, 5 and 30 times their recipe's rate, without a warm-up. Each good export and every one of `broken.py`
with weights in another's place is checked beside the trainer's checkpoint, and beside the base alone.
"""

import tempfile
from collections import Counter
from pathlib import Path

from rich.console import Console

from launch.checks import Outcome
from launch.export import export
from launch.run.run_folder import RunFolder
from launch.sanity.files import file_checks as files
from launch.sanity.files import misplaced, moved
from launch.sanity.tensors import tensor_values
from launch.weights.safetensors_folder import SafetensorsFolder
from launch.weights.shards import read_shards
from recipes.families.common.parts import OUTPUT
from tests.launch.sanity import broken
from tests.launch.support import POOL, ranks_of

RATE = 6e-3
STEPS = {1: (4, 40, 400), 5: (4, 40), 30: (4, 40)}
QUIET = Console(quiet=True)


def show() -> None:
    columns = ["model", "rate", "steps", "matrices in their places", "own cosine, at least", "another's, at most"]
    columns += ["faults found by the checkpoint", "by the base alone"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    with tempfile.TemporaryDirectory() as scratch:
        for model in ("qwen3-tiny", "glm4.5-tiny"):
            for times, steps in STEPS.items():
                _rows(Path(scratch), model, times, steps)
    POOL.close()


def _rows(root: Path, model: str, times: int, steps: tuple[int, ...]) -> None:
    words = [f"model={model}", f"optim.lr={RATE * times:g}", "optim.warmup_steps=1", f"run={model}-{times}"]
    with ranks_of(root, *words) as (plan, ranks):
        run = RunFolder(plan.recipe, plan.data, plan.heldout)
        for step in range(max(steps)):
            ranks.call("train_step", step)
            if step + 1 not in steps:
                continue
            with run.new_checkpoint(step + 1) as folder:
                ranks.call("save", str(folder), step + 1)
            saved = run.checkpoint(step + 1)
            assert saved is not None
            export.export_checkpoint(plan.recipe, saved, run.hf, QUIET)
            told = _told(plan.recipe, run.hf)
            by = _caught(plan.recipe, run.hf, saved, root / f"broken-{model}-{times}-{step}")
            print(f"| {model} | {times} × | {step + 1} | {told} | {by} |", flush=True)


def _told(recipe, hf: Path) -> str:
    found, base = read_shards(hf), SafetensorsFolder(Path(recipe.model.checkpoint))
    seen = tensor_values.compare(found, base, recipe.model, tensor_values.reach(recipe.optim, None), False, QUIET)
    places = misplaced.find(moved.trained(seen, recipe.model))
    matrices = [f for f in places if len(seen[f.name].shape) == 2 and f.name != OUTPUT]
    assert not any(f.fault for f in places)
    placed = sum(f.placed for f in matrices)
    return f"{placed} of {len(matrices)} | {min(f.own for f in matrices):.3f} | {max(f.other for f in matrices):.3f}"


def _caught(recipe, hf: Path, checkpoint: Path, scratch: Path) -> str:
    base = Path(recipe.model.checkpoint)
    exact, alone = Counter[Outcome](), Counter[Outcome]()
    for name, fault in broken.of(hf).items():
        if fault.check != broken.TRAINED:
            continue
        folder = broken.make(fault, hf, base, base, scratch / name)
        for known, counted, check in ((checkpoint, exact, broken.TRAINED), (None, alone, broken.PLACES)):
            done = files.file_checks(folder, base, recipe, None, known, console=QUIET, written=scratch / "moved.json")
            if known or fault.by_base:
                counted[next(c.outcome for c in done if c.name == check)] += 1
    assert exact.keys() == {Outcome.failed} and Outcome.passed not in alone
    return f"{exact.total()} of {exact.total()} | {alone[Outcome.failed]} of {alone.total()}, {alone[Outcome.warned]} cannot be told"


if __name__ == "__main__":
    show()
