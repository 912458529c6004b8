"""Run folders in every state, made by the functions that make them, without training: the base is exported as it is."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from data_prep.files import whole_folder, write_text
from launch.checks import Check, Outcome
from launch.run import run_state
from launch.run.run_folder import RECORD, RunFolder, sizes
from launch.run.run_plan import Plan
from launch.run.run_state import Reached
from launch.run.which_run import TRACKER
from launch.weights import hf_folder
from recipes.config import EngineName, Recipe
from tests.launch.support import recipe_of

SHORT = ["optim.epochs=4"]  # 20 steps


def run_in(state: Reached, root: Path, *words: str) -> tuple[Recipe, RunFolder]:
    """A run under `root` that was killed right after it came so far; nobody holds it."""
    recipe, data, heldout = recipe_of(root, *SHORT, *words)
    plan, run = Plan(recipe, data, heldout), RunFolder(recipe, data, heldout)
    if state >= Reached.begun:
        run.open()
        plan.write(run.root / "plan.json")
        lines = [{"step": 0, "heldout_loss": 6.5}, {"step": 1, "loss": 6.6, "lr": 1e-3}]
        write_text(run.root / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    if state >= Reached.trained:
        save(run, plan.schedule.num_steps)
    if state >= Reached.exported:
        export(run, plan.schedule.num_steps)
    if state >= Reached.failed:
        found(run, Outcome.passed if state is Reached.passed else Outcome.failed)
        write_text(run.root / "report.html", "")
        run_state.mark_checked(run.root)
    if run._lock:
        run._lock.close()
    return recipe, run


def save(run: RunFolder, step: int) -> Path:
    """A checkpoint as the run's engine leaves it."""
    if run.recipe.engine.name is EngineName.megatron:
        with run.new_checkpoint(step) as folder:
            (folder / "weights").write_text(str(step))
        return run.root / "checkpoints" / f"step_{step:06}"
    folder = run.root / "checkpoints" / f"iter_{step - 1:07}"
    folder.mkdir(parents=True)
    (folder / ".metadata").write_text(str(step))
    write_text(folder.parent / TRACKER, str(step - 1))
    run.write_record(folder, step, sizes(folder))
    assert (folder / RECORD).is_file()
    return folder


def export(run: RunFolder, step: int) -> None:
    """The base as the export of this step's checkpoint."""
    base, checkpoint = Path(run.recipe.model.checkpoint), run.checkpoint(step)
    assert checkpoint is not None
    with whole_folder(run.hf) as scratch:
        for file in base.glob("*.safetensors"):
            shutil.copyfile(file, scratch / file.name)
        weight_map = json.loads((base / hf_folder.INDEX).read_text())["weight_map"]
        hf_folder.finish(scratch, weight_map, run.recipe.model, checkpoint.name)


def found(run: RunFolder, *outcomes: Outcome) -> None:
    """What a check of the export wrote."""
    checks = [Check(f"check {i}", "", "", "", outcome) for i, outcome in enumerate(outcomes)]
    write_text(run.root / "sanity.json", json.dumps([asdict(c) for c in checks]))


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of every file and folder."""
    return {
        str(p.relative_to(folder)): (p.read_bytes() if p.is_file() else b"", p.stat().st_mtime_ns)
        for p in [folder, *folder.rglob("*")]
    }
