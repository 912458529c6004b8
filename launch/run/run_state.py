"""How far a run has come: what its folder holds, and what `make train` does next.

Each mark is a file or folder that is whole or absent, put there once what it stands for is whole. What comes after a mark counts
only with it: a kill between two of them costs what lies between.
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
from recipes.errors import CheckpointError
from recipes.paths import run_folder

MARK = "checked.json"  # SHA-256 of the export's manifest and of what its check found, written after the report
_LONGER = "To train on from its result, by a schedule of its own: the same words with run=OTHER model.checkpoint={}"


class Reached(IntEnum):
    """nothing: no plan. begun: a plan, with checkpoints or none. trained: the last step's checkpoint. exported: `hf/` of it. failed,
    passed: its check was made to the end."""

    nothing = 0
    begun = 1
    trained = 2
    exported = 3
    failed = 4
    passed = 5


@dataclass(frozen=True)
class State:
    """completed: steps behind `checkpoint`, the newest; steps: of the whole run, where it has a checkpoint or an export. failed:
    names of checks."""

    reached: Reached
    steps: int = 0
    completed: int = 0
    checkpoint: Path | None = None
    failed: tuple[str, ...] = ()

    @property
    def next(self) -> str:
        """What `make train` does."""
        done = f"{self.steps} steps, nothing of which is trained again"
        begun = "has no whole checkpoint yet: trains from the first step"
        if self.checkpoint:
            begun = f"goes on from {self.checkpoint}, step {self.completed} of {self.steps}"
        return {
            Reached.nothing: "trains from the first step",
            Reached.begun: begun,
            Reached.trained: f"is trained ({done}): exports {self.checkpoint}, and checks the export",
            Reached.exported: f"is trained and exported ({done}): checks the export",
            Reached.failed: f"is trained and exported ({done}): checks the export again, which failed: {', '.join(self.failed)}",
            Reached.passed: f"is finished ({done})",
        }[self.reached]


def of(recipe: Recipe, *, read: bool = False) -> State:
    """The state of the run of this name, as the recipe would have its export, whose files are looked at, or `read`. Changes nothing.

    Raises `CheckpointError` where it was trained to the end, and what is left can neither be checked nor exported.
    """
    root = run_folder(recipe)
    if not (root / "plan.json").is_file():
        return State(Reached.nothing)
    whole, made = which_run.whole(root), hf_folder.manifest(root / "hf")
    if not whole and made is None:
        return State(Reached.begun)
    steps = which_run.steps(root)
    of_last = made is not None and which_run.completed(made["checkpoint"]) == steps
    fault = _unlike(recipe, read) if of_last else None
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


def _unlike(recipe: Recipe, read: bool) -> str | None:
    """What of `hf/` is not as its export wrote it, or not as the recipe wants it."""
    folder, m = run_folder(recipe) / "hf", recipe.model
    if fault := hf_folder.damage(folder, read=read):
        return fault
    made = hf_folder.manifest(folder)
    if m.mtp_layers and made and made["mtp"] != m.mtp.value:
        return f"it was exported with model.mtp={made['mtp']}, and the recipe says model.mtp={m.mtp.value}"
    return None


def _lost(recipe: Recipe, fault: str) -> CheckpointError:
    export = run_folder(recipe) / "hf"
    return CheckpointError(
        f"run={recipe.run} is trained, its export '{export}' is not as it should be ({fault}), and the whole checkpoint of its last "
        "step, which could be exported again, is gone",
        "put either back; or write anew=true, which moves the run aside and trains from the first step",
    )


def mark_checked(root: Path) -> None:
    """Says that the check of the export was made to the end, and its report written; `sanity.json` has what it found."""
    if hashes := _hashes(root):
        write_text(root / MARK, json.dumps(hashes, indent=2) + "\n")


def _failed(root: Path) -> tuple[str, ...] | None:
    """Names of the failed checks of the export that is there; None where its check was not made to the end."""
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
    """None where either is not there."""
    paths = {"export": root / "hf" / hf_folder.MANIFEST, "sanity": root / "sanity.json"}
    return {name: sha256(path) for name, path in paths.items()} if all(p.is_file() for p in paths.values()) else None


def finished(recipe: Recipe, state: State) -> str:
    """What a finished run has come to, and what to type next."""
    root = run_folder(recipe)
    lines = metrics.read(root / metrics.NAME)
    losses, unseen = ([m[name] for m in lines if name in m] for name in ("loss", "heldout_loss"))
    figures = [f"loss {losses[0]:.4f} → {losses[-1]:.4f}"]
    if unseen:
        figures.append(f"held-out loss {unseen[0]:.4f} → {unseen[-1]:.4f}")
    figures.append(f"{len(json.loads((root / 'sanity.json').read_text(encoding='utf-8')))} checks, none failed")
    again = commands.of_run("sanity", recipe, *(w for w in recipe.words if w.startswith("sanity.")))
    # Without its MTP layers an export is no base of the same recipe.
    longer = [] if recipe.model.mtp_layers and recipe.model.mtp is Mtp.drop else [_LONGER.format(root / "hf")]
    return "\n".join(
        [
            f"{recipe.run} {state.next}: {', '.join(figures)}",
            f"report: {root / 'report.html'}   checkpoint: {root / 'hf'}",
            f"To check it again: `{again}`",
            *longer,
            "To train it again from the first step: the same words and anew=true, which moves this run aside",
        ]
    )
