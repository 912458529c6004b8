"""The embedded engine's driver: every step of the schedule on all ranks, checkpoints, and the export."""

import contextlib
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data_prep.files import whole_folder, write_text
from launch.megatron.ranks import Ranks
from launch.metrics import Metrics
from launch.plan import Plan
from launch.run_folder import RunFolder
from recipes.checkpoint_config import exported
from recipes.config import Recipe

_KEPT_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "vocab.json", "merges.txt",
    "generation_config.json",
)  # fmt: skip


def train(plan: Plan, run: RunFolder, console: Console) -> bool:
    """Trains from the last whole checkpoint (or the base) to the last step, and exports to `hf/`; whether it came so far.

    SIGTERM, by which a scheduler takes its machines back, lets the step end, saves, and leaves the rest to the next start.

    Raises `TrainError` where a rank died, hung or met a number that is not finite; the checkpoints stay.
    """
    recipe = plan.recipe
    completed, checkpoint, note = run.open()
    if note:
        console.print(note)
    plan.write(run.root / "plan.json")
    with Ranks(recipe) as ranks:
        with console.status(f"Starting {plan.world_size} ranks"):
            folders = (str(plan.data.folder), str(plan.heldout.folder))
            ranks.build(folders, (plan.schedule, plan.heldout_schedule))
            if checkpoint is not None:
                completed = ranks.call("load", str(checkpoint))[0]
        metrics = Metrics(run.root, completed)
        with contextlib.closing(metrics), _progress(console, plan.schedule.num_steps, completed) as advance:
            done = _steps(plan, run, ranks, metrics, completed, advance)
        if done < plan.schedule.num_steps:
            console.print(f"SIGTERM: saved after step {done} of {plan.schedule.num_steps}; the same command goes on")
            return False
        with console.status("Exporting to Hugging Face format"):
            _export(recipe, run, ranks)
    return True


class _Sigterm:
    """A context in which SIGTERM is noted and ends nothing."""

    def __enter__(self) -> "_Sigterm":
        self.came = False
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = True

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)


def _steps(plan: Plan, run: RunFolder, ranks: Ranks, metrics: Metrics, completed: int, advance: Any) -> int:
    """Runs the steps that are left, or up to SIGTERM; returns the number of those completed, the last of them saved."""
    recipe, total = plan.recipe, plan.schedule.num_steps

    def evaluate(step: int) -> None:
        metrics.add({"step": step, "heldout_loss": ranks.call("heldout_loss")[0]})

    if completed == 0:
        evaluate(0)
    with _Sigterm() as sigterm:
        for step in range(completed, total):
            line = ranks.call("train_step", step)[0]
            metrics.add(line)
            done = step + 1
            if done % recipe.optim.eval_steps == 0 or done == total:
                evaluate(done)
            if done % recipe.engine.save_steps == 0 or done == total or sigterm.came:
                with run.new_checkpoint(done) as folder:
                    ranks.call("save", str(folder), done)
            advance(line)
            if sigterm.came:
                return done
    return total


@contextlib.contextmanager
def _progress(console: Console, total: int, completed: int) -> Iterator[Any]:
    """A bar on a terminal, a line every tenth of the run elsewhere. Yields what to call after each step."""
    columns = (
        TextColumn("Training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("train", total=total, completed=completed, loss=float("nan"))

        def advance(line: dict[str, Any]) -> None:
            bar.update(task, advance=1, loss=line["loss"])
            if not console.is_terminal and (line["step"] % max(1, total // 10) == 0 or line["step"] == total):
                console.print(f"step {line['step']}/{total}  loss {line['loss']:.4f}  {line['time']['step_s']:.2f} s")

        yield advance


def _export(recipe: Recipe, run: RunFolder, ranks: Ranks) -> None:
    """Writes `hf/` whole: tensors from the ranks, everything else from the base."""
    base = Path(recipe.model.checkpoint)
    shutil.rmtree(run.hf, ignore_errors=True)
    with whole_folder(run.hf) as scratch:
        weight_map: dict[str, str] = {}
        for written in ranks.call("export", str(scratch)):
            weight_map |= written
        _name_shards(scratch, weight_map)
        config = exported(recipe.model, json.loads((base / "config.json").read_text()))
        write_text(scratch / "config.json", json.dumps(config, indent=2) + "\n")
        for name in _KEPT_FILES:
            if (base / name).is_file():
                shutil.copyfile(base / name, scratch / name)


def _name_shards(folder: Path, weight_map: dict[str, str]) -> None:
    """Renames the ranks' files to Hugging Face's `model-00001-of-0000N.safetensors` and writes the index."""
    files = sorted(set(weight_map.values()))
    names = {old: f"model-{i:05}-of-{len(files):05}.safetensors" for i, old in enumerate(files, 1)}
    size = 0
    for old, new in names.items():
        (folder / old).rename(folder / new)
        with (folder / new).open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        size += (folder / new).stat().st_size - 8 - header
    index = {"metadata": {"total_size": size}, "weight_map": {k: names[v] for k, v in sorted(weight_map.items())}}
    write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
