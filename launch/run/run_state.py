"""The state of a run: what its folder contains, and what `make train` does next.

Each stage ends with a mark, a file or folder that is written atomically after the stage is complete. Later marks count only
if the earlier ones exist. A kill between two marks costs only the work between them.
"""

import json
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from data_prep.files import sha256, write_text
from launch.run import metrics, which_run
from launch.run.run_folder import RECORD, damage
from launch.weights import hf_folder
from recipes.compose import commands
from recipes.config import Mtp, Recipe
from recipes.errors import CheckpointError, ConfigError
from recipes.paths import run_folder

MARK = "checked.json"  # SHA-256 of the export's manifest and of the check results, written after the report
_TRAIN_FURTHER = (
    "To train further from its result with a new schedule: the same overrides with run=OTHER model.checkpoint={}"
)


class Reached(IntEnum):
    """The last stage that a run has reached.

    nothing: no plan. begun: a plan, with or without checkpoints. trained: the checkpoint of the last step. exported: `hf/` of
    that checkpoint. failed, passed: the check of the export is complete.
    """

    nothing = 0
    begun = 1
    trained = 2
    exported = 3
    failed = 4
    passed = 5


@dataclass(frozen=True)
class State:
    """The state of a run.

    steps: the run's total number of steps; None if it has neither a checkpoint nor an export. completed: steps done at
    `checkpoint`, the newest checkpoint. failed:
    names of the failed checks.
    """

    reached: Reached
    steps: int = 0
    completed: int = 0
    checkpoint: Path | None = None
    failed: tuple[str, ...] = ()

    @property
    def next(self) -> str:
        """Say what `make train` does next."""
        done = f"{self.steps} steps, nothing of which is trained again"
        begun = "has no whole checkpoint yet: trains from the first step"
        if self.checkpoint:
            begun = f"goes on from {self.checkpoint}, step {self.completed} of {self.steps}"
        return {
            Reached.nothing: "trains from the first step",
            Reached.begun: begun,
            Reached.trained: f"is trained ({done}): exports {self.checkpoint}, and checks the export",
            Reached.exported: f"is trained and exported ({done}): checks the export",
            Reached.failed: f"is trained and exported ({done}): checks the export again; failed checks: {', '.join(self.failed)}",
            Reached.passed: f"is finished ({done})",
        }[self.reached]


def of(recipe: Recipe, *, read: bool = False) -> State:
    """Return the state of the recipe's run. Change nothing.

    An export counts if it matches the recipe and its files are intact. Files are compared by name and size, and with `read`
    also by SHA-256. Raise `CheckpointError` if training is complete but the remaining files can neither be checked nor exported.
    """
    root = run_folder(recipe)
    if not (root / "plan.json").is_file():
        return State(Reached.nothing)
    whole, export = which_run.whole(root), hf_folder.manifest(root / "hf")
    if not whole and export is None:
        return State(Reached.begun)
    steps = which_run.steps(root)
    of_last = export is not None and which_run.completed(export["checkpoint"]) == steps
    fault = _mismatch(recipe, read) if of_last else None
    if of_last and fault is None:
        failed = _failed(root)
        reached = Reached.exported if failed is None else Reached.failed if failed else Reached.passed
        return State(reached, steps, steps, whole.get(steps), failed or ())
    if steps in whole and (whole[steps] / RECORD).is_file() and damage(whole[steps]):
        del whole[steps]
    if fault and steps not in whole:
        raise _lost(recipe, fault)
    completed = max(whole, default=0)
    reached = Reached.trained if completed == steps else Reached.begun
    return State(reached, steps, completed, whole.get(completed))


def _mismatch(recipe: Recipe, read: bool) -> str | None:
    """Return the first damage of `hf/`, or its mismatch with the recipe; None if there is none."""
    folder, m = run_folder(recipe) / "hf", recipe.model
    if fault := hf_folder.damage(folder, read=read):
        return fault
    export = hf_folder.manifest(folder)
    if m.mtp_layers and export and export["mtp"] != m.mtp.value:
        return f"it was exported with model.mtp={export['mtp']}, and the recipe says model.mtp={m.mtp.value}"
    return None


def _lost(recipe: Recipe, fault: str) -> CheckpointError:
    export = run_folder(recipe) / "hf"
    return CheckpointError(
        f"run={recipe.run} is trained, but its export '{export}' is unusable ({fault}), and the checkpoint of its last step is gone, "
        "so it cannot be exported again",
        "put either back; or write anew=true, which moves the run aside and trains from the first step",
    )


def refuse_weights_alone(checkpoint: Path | None, recipe: Recipe) -> None:
    """Raise `ConfigError` if the run would go on from a checkpoint that holds no optimizer state."""
    from launch.weights.torch_dist import holds_optimizer  # imports torch, which a finished run does without

    if checkpoint is not None and not holds_optimizer(checkpoint):
        done = which_run.completed(checkpoint.name)
        raise ConfigError(
            f"'{checkpoint}' holds weights alone, as engine.save=weights writes them: run={recipe.run} cannot go on from it",
            f"export it with `{commands.of_run('export', recipe, f'STEP={done}')}`; or write anew=true engine.save=full, which moves "
            "the run aside and trains from the first step",
        )


def mark_checked(root: Path) -> None:
    """Mark the check of the export as complete, after its report is written. `sanity.json` has the results."""
    if hashes := _hashes(root):
        write_text(root / MARK, json.dumps(hashes, indent=2) + "\n")


def _failed(root: Path) -> tuple[str, ...] | None:
    """Return the names of the failed checks of the present export; None if its check is not complete."""
    try:
        mark = json.loads((root / MARK).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if mark != _hashes(root):
        return None
    return tuple(
        c["name"] for c in json.loads((root / "sanity.json").read_text(encoding="utf-8")) if c["outcome"] == "fail"
    )


def _hashes(root: Path) -> dict[str, str] | None:
    """Return the hashes of the export's manifest and of the check results; None if either is missing."""
    paths = {"export": root / "hf" / hf_folder.MANIFEST, "sanity": root / "sanity.json"}
    return {name: sha256(path) for name, path in paths.items()} if all(p.is_file() for p in paths.values()) else None


def finished(recipe: Recipe, state: State) -> str:
    """Return the results of a finished run, with the commands to type next."""
    root = run_folder(recipe)
    lines = metrics.read_metrics(root / metrics.NAME)
    losses, heldout = ([m[name] for m in lines if name in m] for name in ("loss", "heldout_loss"))
    figures = [f"loss {losses[0]:.4f} → {losses[-1]:.4f}"]
    if heldout:
        figures.append(f"held-out loss {heldout[0]:.4f} → {heldout[-1]:.4f}")
    figures.append(f"{len(json.loads((root / 'sanity.json').read_text(encoding='utf-8')))} checks, none failed")
    again = commands.of_run("sanity", recipe, *(w for w in recipe.overrides if w.startswith("sanity.")))
    # An export without its MTP layers cannot be the base of the same recipe.
    further = [] if recipe.model.mtp_layers and recipe.model.mtp is Mtp.drop else [_TRAIN_FURTHER.format(root / "hf")]
    return "\n".join(
        [
            f"{recipe.run} {state.next}: {', '.join(figures)}",
            f"report: {root / 'report.html'}   checkpoint: {root / 'hf'}",
            f"To check it again: `{again}`",
            *further,
            "To train it again from the first step: the same overrides and anew=true, which moves this run aside",
        ]
    )
