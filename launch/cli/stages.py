"""The stages: what each is called, what it does, and the function that does it."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console

from recipes.config import Recipe
from recipes.errors import ConfigError
from recipes.paths import in_ray_job


@dataclass(frozen=True)
class Stage:
    """function: `module:name`, imported when the stage runs. on_cluster: if `cluster.address` is set, the stage runs there as a job,
    because its files are there. own: options that other stages do not read. only: all options that it reads, if they are few."""

    name: str
    does: str
    function: str
    on_cluster: bool = False
    own: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def run(self, recipe: Recipe, console: Console) -> None:
        if self.on_cluster and recipe.cluster.address is not None and not in_ray_job():
            from launch.cluster import submit

            return submit.submit(self.name, recipe, console)
        module, name = self.function.split(":")
        stage: Callable[[Recipe, Console], None] = getattr(importlib.import_module(module), name)
        stage(recipe, console)


_STAGES = (
    Stage("train", "data, training, export, sanity check and report", "launch.cli.train:train", True),
    Stage("rehearse", "through slime: a step on the longest sequence, a save, a reload and a step after it",
          "launch.cli.train:rehearse", True),
    Stage("replay", "repeat one step of a run, whole and sequence by sequence", "launch.cli.after_training:replay", own=("step",)),
    Stage("fetch", "fetch the model, and data sets named by a Hugging Face id, once", "launch.run.fetch_models:fetch_all", True),
    Stage("export", "write the Hugging Face folder of a run's newest checkpoint, or of `step`'s", "launch.cli.after_training:export",
          True, own=("step",)),
    Stage("sanity", "check an export: its files, then what SGLang makes of it", "launch.cli.after_training:sanity", True,
          own=("checkpoint",)),
    Stage("serve", "serve an export with SGLang until it is interrupted", "launch.cli.after_training:serve", True,
          own=("checkpoint",)),
    Stage("data", "pack the training and the held-out trajectories, every mask proved", "launch.cli.before_training:data", True),
    Stage("inspect", "show the sequences of one trajectory, supervised tokens coloured", "launch.cli.before_training:inspect",
          own=("id", "html")),
    Stage("plan", "layout, memory, steps, time and cost, before a GPU is taken", "launch.cli.before_training:plan"),
    Stage("check", "everything that would end or spoil a run, before a GPU is held", "launch.cli.before_training:check", True),
    Stage("parity", "train the tiny models in every layout of the embedded engine, compared with one rank",
          "launch.bench.parity:show_parity", only=("dry_run",)),
    Stage("bench", "measure the schedule, planning, the embedded engine, the sandbox, and the data stage against the tokenizer alone",
          "launch.bench.bench:run_bench", only=("dry_run", "cluster.root", "model", "model.checkpoint")),
    Stage("bench-gpu", "measure the embedded engine on one GPU, compared with transformers, a roofline, and the plan",
          "launch.bench.gpu.run:bench_gpu", own=("limit_s", "smoke", "bench.rows", "bench.sides", "bench.steps")),
    Stage("attach", "show the run's last job on the cluster from its first line, and watch it to its end",
          "launch.cluster.submit:attach"),
    Stage("stop", "stop the run's last job on the cluster; `train` goes on from its last checkpoint", "launch.cluster.submit:stop"),
    Stage("slurm", "print the sbatch script that starts Ray on the nodes and runs the recipe there",
          "launch.cli.before_training:slurm"),
    Stage("kuberay", "print the RayJob manifest that runs the recipe on Kubernetes", "launch.cli.before_training:kuberay"),
)  # fmt: skip
STAGES = {stage.name: stage for stage in _STAGES}


def check_overrides(stage: Stage, overrides: list[str]) -> None:
    """Raise `ConfigError` for an override that the stage would not read."""
    for name in (override.partition("=")[0] for override in overrides):
        readers = [other.name for other in _STAGES if name in other.own]
        if readers and name not in stage.own:
            start = "write model.checkpoint=FOLDER to start from it, or " if name == "checkpoint" else ""
            raise ConfigError(
                f"{name} is an option of {' and '.join(readers)}, and {stage.name} does not read it",
                f"{start}leave it out",
            )
        if stage.only and name not in stage.only:
            raise ConfigError(
                f"{stage.name} does not read {name}: it measures models of its own",
                f"leave out all but {', '.join(stage.only)}",
            )


def refuse_anew(stage: Stage, recipe: Recipe) -> None:
    """Raise `ConfigError` if the recipe says `anew` to a stage that trains no run: a scheduler that repeats it would do so each
    time."""
    if recipe.anew and stage.name != "train":
        raise ConfigError(
            f"anew=true is of `make train` alone, which trains a run again from its first step; {stage.name} does not",
            "leave out anew=true",
        )
