"""The stages of a run, in the order it takes them, each a function of the recipe."""

import functools
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from recipes.config import EngineName, Recipe
from recipes.errors import ConfigError
from recipes.paths import in_ray_job, run_folder

Stage = Callable[[Recipe, Console], None]


def _on_cluster(stage: Stage) -> Stage:
    """Runs the stage as a job of the Ray cluster at `cluster.address`, where there is one: its files are there."""

    @functools.wraps(stage)
    def here_or_there(recipe: Recipe, console: Console) -> None:
        if recipe.cluster.address is None or in_ray_job():
            return stage(recipe, console)
        from launch.cluster import submit

        submit.submit(stage.__name__, recipe, console)

    return here_or_there


@_on_cluster
def fetch(recipe: Recipe, console: Console) -> None:
    """Fetches the model, and data sets named by a Hugging Face id, once; asks nothing of the hub where they are here."""
    from launch.run.fetch_models import fetch_all

    fetch_all(recipe, console)


@_on_cluster
def data(recipe: Recipe, console: Console) -> None:
    """Packs the training and the held-out trajectories, every mask proved."""
    from launch.run import prepare

    packed = prepare.packed(recipe, console)
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("", "records", "rejected", "sequences", "tokens", "supervised", "longest"):
        table.add_column(column, justify="right" if column else "left")
    for name, one in packed.items():
        counts = one.manifest["counts"]
        figures = [f"{counts[key]:,}" for key in ("records", "rejected", "sequences", "tokens", "supervised")]
        table.add_row(name, *figures, f"{max(one.lengths):,}")
    console.print(table)
    for name, one in packed.items():
        console.print(f"{name}: {one.folder}")


def inspect(recipe: Recipe, console: Console) -> None:
    """Shows one trajectory's sequences, supervised tokens coloured; without `id`, lists all."""
    from data_prep.pack import show
    from launch.run import prepare

    all_packed = prepare.packed(recipe, console)
    for name, packed in all_packed.items():
        if recipe.id is None:
            console.print(show.listing(name, packed))
        elif recipe.id in packed.ids:
            show.sequences(packed, recipe, console)
            return
    if recipe.id is None:
        console.print("write id=ID to see one")
        return
    show.refuse_unknown(recipe.id, all_packed)


def plan(recipe: Recipe, console: Console) -> None:
    """Layout, memory, steps, time and cost, before a GPU is taken."""
    from data_prep.files import write_text
    from launch.run import prepare
    from recipes.plan import plan_page, plan_summary, plan_table, planner

    made = planner.plan(recipe, prepare.sequences(recipe, console))
    found = plan_summary.summary(made, planner.released(made))
    for part in plan_table.show(found):
        console.print(part)
    folder = Path(recipe.cluster.root) / "plans" / recipe.run
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "plan.json", json.dumps(found, indent=2) + "\n")
    write_text(folder / "plan.html", plan_page.render(found))
    console.print(f"plan: {folder / 'plan.html'} and plan.json")
    planner.refuse_too_large(made)


@_on_cluster
def check(recipe: Recipe, console: Console) -> None:
    """Everything that would end or spoil a run, before a GPU is held: recipe, checkpoint, data, memory, disk; with slime the
    cluster's nodes, what is on them, their shared folder and network."""
    from launch.preflight import checklist, machine, recipe_checks
    from launch.run import prepare

    able = machine.machine(recipe)
    rows = recipe_checks.rows(recipe, lambda: prepare.packed(recipe, console), able)
    if recipe.engine.name is EngineName.slime and not able.red:
        from launch.preflight import cluster_checks as on_cluster

        rows += on_cluster.connected_rows(recipe, console)
    console.print(checklist.table(rows, console.width))
    checklist.warn(rows, console)
    checklist.refuse(rows)


@_on_cluster
def rehearse(recipe: Recipe, console: Console) -> None:
    """A step on the longest sequence, a save, a reload and a step after it, through slime."""
    from launch.cli import train

    train.rehearse(recipe, console)


@_on_cluster
def train(recipe: Recipe, console: Console) -> None:
    """Data, training, export, sanity check, report."""
    from launch.cli import train

    train.train(recipe, console)


def replay(recipe: Recipe, console: Console) -> None:
    """Repeats one step of a run, `step`, whole and sequence by sequence; the recipe is the run's own."""
    from launch.megatron import replay
    from launch.preflight import checklist, machine
    from launch.run import prepare, which_run
    from launch.run.run_folder import RunFolder
    from launch.run.run_plan import of_run

    own = which_run.own_recipe(recipe)
    if own.engine.name is not EngineName.megatron:
        raise ConfigError(
            f"run={own.run} was trained through slime, and a replay is the embedded engine's",
            "write run=NAME of a run that it trained",
        )
    checklist.refuse([machine.machine(own)])
    prepare.base(own, console)
    plan = replace(of_run(run_folder(own)), recipe=own)
    if recipe.step is None or recipe.step > plan.schedule.num_steps:
        raise ConfigError(
            f"step={recipe.step}: the run has steps 1 to {plan.schedule.num_steps}", "write step=N (make: STEP=N)"
        )
    replay.replay(plan, RunFolder(own, plan.data, plan.heldout), recipe.step, console)


@_on_cluster
def export(recipe: Recipe, console: Console) -> None:
    """Hugging Face folder of a run's newest checkpoint, or of `step`'s; the recipe is the run's own."""
    from launch.export import export
    from launch.run import which_run

    run = run_folder(recipe)
    own = which_run.own_recipe(recipe)
    step, checkpoint = which_run.pick(run, recipe.step)
    export.export(own, checkpoint, which_run.target(run, step), console)


@_on_cluster
def sanity(recipe: Recipe, console: Console) -> None:
    """Checks an export, of `checkpoint` or of the run: its files, then what SGLang makes of it."""
    from launch.cli import train
    from launch.run import which_run
    from launch.sanity import sanity_check, subject

    started = time.perf_counter()
    own, folder = which_run.exported(recipe)
    sanity_check.say_unserved(own, folder, console)
    train.check(subject.of_export(own, folder, console), console, started)


def serve(recipe: Recipe, console: Console) -> None:
    """Serves an export with SGLang on this machine until it is interrupted, with a request to try."""
    from launch.serving import serve

    serve.serve(recipe, console)


def parity(recipe: Recipe, console: Console) -> None:
    """Trains the tiny models in every layout of the embedded engine, beside one rank."""
    from launch.bench import parity

    parity.show(console)


def bench(recipe: Recipe, console: Console) -> None:
    """Measures the assignment inside a step, planning, the embedded engine, and the data stage against the tokenizer alone."""
    from launch.bench import bench

    bench.run(recipe, console)


def bench_gpu(recipe: Recipe, console: Console) -> None:
    """Measures the embedded engine on one GPU: beside transformers, a roofline, and the plan."""
    from launch.bench.gpu import run

    run.run(recipe, console)


def attach(recipe: Recipe, console: Console) -> None:
    """Shows the run's last job on the cluster from its first line, and watches it to its end."""
    from launch.cluster import submit

    submit.attach(recipe, console)


def stop(recipe: Recipe, console: Console) -> None:
    """Stops the run's last job on the cluster; `train` goes on from its last checkpoint."""
    from launch.cluster import submit

    submit.stop(recipe, console)


def slurm(recipe: Recipe, console: Console) -> None:
    """Prints the sbatch script that starts Ray on the nodes and runs the recipe there."""
    from launch.cluster import schedulers

    console.file.write(schedulers.slurm(recipe))


def kuberay(recipe: Recipe, console: Console) -> None:
    """Prints the RayJob manifest that runs the recipe on Kubernetes."""
    from launch.cluster import schedulers

    console.file.write(schedulers.kuberay(recipe))


STAGES: dict[str, Stage] = {
    "train": train,
    "rehearse": rehearse,
    "replay": replay,
    "fetch": fetch,
    "export": export,
    "sanity": sanity,
    "serve": serve,
    "data": data,
    "inspect": inspect,
    "plan": plan,
    "check": check,
    "parity": parity,
    "bench": bench,
    "bench-gpu": bench_gpu,
    "attach": attach,
    "stop": stop,
    "slurm": slurm,
    "kuberay": kuberay,
}


# Options that some stages read and the others do not.
_READ_BY: dict[str, tuple[Stage, ...]] = {
    "id": (inspect,),
    "step": (replay, export),
    "checkpoint": (sanity, serve),
    "limit_s": (bench_gpu,),
}
_READS: dict[Stage, tuple[str, ...]] = {  # of stages that read no others
    parity: ("dry_run",),
    bench: ("dry_run", "cluster.root", "model", "model.checkpoint"),
}


def check_words(stage: Stage, words: list[str]) -> None:
    """Raises `ConfigError` for a word that the stage would not read."""
    called = next(name for name, one in STAGES.items() if one is stage)
    for name in (word.partition("=")[0] for word in words):
        if stage not in _READ_BY.get(name, (stage,)):
            readers = " and ".join(n for n, one in STAGES.items() if one in _READ_BY[name])
            start = "write model.checkpoint=FOLDER to start from it, or " if name == "checkpoint" else ""
            raise ConfigError(
                f"{name} is an option of {readers}, and {called} does not read it", f"{start}leave it out"
            )
        if name not in _READS.get(stage, (name,)):
            raise ConfigError(
                f"{called} does not read {name}: it measures models of its own",
                f"leave out all but {', '.join(_READS[stage])}",
            )


def refuse_anew(stage: Stage, recipe: Recipe) -> None:
    """Raises `ConfigError` where the recipe says `anew` to a stage that trains no run; one that a scheduler repeats would do so
    each time."""
    if recipe.anew and stage is not train:
        raise ConfigError(
            f"anew=true is of `make train` alone, which trains a run again from its first step; {stage.__name__} does not",
            "leave out anew=true",
        )
