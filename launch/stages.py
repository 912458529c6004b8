"""The stages of a run, in the order it takes them, each a function of the recipe."""

import difflib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from recipes.checkpoint_config import check_checkpoint
from recipes.compose import in_ray_job, run_folder, to_yaml
from recipes.config import EngineName, Recipe
from recipes.context import check_context
from recipes.errors import ConfigError, TrainError
from recipes.layout import data_parallel, world_size

if TYPE_CHECKING:
    from data_prep.dataset import Dataset
    from launch.plan import Plan
    from launch.run_folder import RunFolder
    from recipes.search import Sequences

Stage = Callable[[Recipe, Console], None]


def fetch(recipe: Recipe, console: Console) -> None:
    """Fetches the model, and data sets named by a Hugging Face id, once; asks nothing of the hub where they are here."""
    from launch.fetch import fetch_all

    fetch_all(recipe, console)


def data(recipe: Recipe, console: Console) -> None:
    """Packs the training and the held-out trajectories, every mask proved."""
    packed = _packed(recipe, console)
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
    from data_prep import show

    all_packed = _packed(recipe, console)
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
    from recipes import plan_page, plan_summary, plan_table, planner

    made = planner.plan(recipe, _sequences(recipe, console))
    found = plan_summary.summary(made, planner.released(made))
    for part in plan_table.show(found):
        console.print(part)
    folder = Path(recipe.cluster.root) / "plans" / recipe.run
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "plan.json", json.dumps(found, indent=2) + "\n")
    write_text(folder / "plan.html", plan_page.render(found))
    console.print(f"plan: {folder / 'plan.html'} and plan.json")
    planner.refuse_too_large(made)


def _sequences(recipe: Recipe, console: Console) -> "Sequences":
    """What is trained on: the packed data where it and the tokenizer are on this machine, LIMI's published lengths otherwise."""
    from data_prep.fetch import is_hub_id, local
    from recipes import lengths
    from recipes.search import Sequences

    missing = []
    if not Path(recipe.data.path).exists():
        if not is_hub_id(recipe.data.path):
            local(recipe.data.path, recipe.cluster.root)  # says what is wrong with it
        missing.append(f"data.path={recipe.data.path}")
    if not recipe.model.random_init and not (Path(recipe.model.checkpoint) / "tokenizer.json").is_file():
        missing.append(f"model.checkpoint={recipe.model.checkpoint}")
    if missing:
        assumed = [n for n in lengths.quantiles() if n <= recipe.data.max_tokens]
        if not assumed:
            raise ConfigError(
                f"data.max_tokens={recipe.data.max_tokens} is below the shortest of LIMI's trajectories, {lengths.SHORTEST:,} "
                "tokens; raise it, or name data and a tokenizer that are on this machine"
            )
        console.print(
            f"not on this machine: {' and '.join(missing)}. Nothing was measured: the plan is for {len(assumed)} sequences as "
            f"LIMI's were published, {assumed[0]:,} to {assumed[-1]:,} tokens",
            style="yellow",
        )
        return Sequences(range(len(assumed)), assumed, "as LIMI's were published")
    return _of_data(recipe, _packed(recipe, console)["training"])


def _of_data(recipe: Recipe, data: "Dataset") -> "Sequences":
    from recipes.search import Sequences

    return Sequences(data.trajectory, data.lengths, f"packed from {recipe.data.path}")


def check(recipe: Recipe, console: Console) -> None:
    """Everything that would end or spoil a run, before a GPU is held: recipe, checkpoint, data, memory, disk; with slime the
    cluster's nodes, what is on them, their shared folder and network."""
    from launch import checklist, preflight
    from recipes.compose import in_ray_job

    slime = recipe.engine.name is EngineName.slime
    if slime and recipe.cluster.address is not None and not in_ray_job():
        raise ConfigError(
            f"a check of cluster.address={recipe.cluster.address} runs there; write ray job submit --working-dir . -- "
            "launch/limi.py check, with the same words"
        )
    rows = preflight.rows(recipe, lambda: _packed(recipe, console))
    if slime:
        from launch.slime import preflight as on_cluster

        rows += on_cluster.connected_rows(recipe)
    console.print(checklist.table(rows))
    checklist.refuse(rows)


def train(recipe: Recipe, console: Console) -> None:
    """Data, training, export, sanity check, report."""
    if recipe.cluster.address is not None and not in_ray_job():
        from launch import submit

        return submit.submit("train", recipe, console)
    from launch.sanity.server import free_port

    started = time.perf_counter()
    through_slime = recipe.engine.name is EngineName.slime
    if recipe.layout.search and not through_slime:
        raise ConfigError("layout=auto is for GPUs, whose times can be predicted; write layout=data_parallel")
    free_port(recipe.sanity.port)
    if recipe.data.heldout is None and not through_slime:
        raise ConfigError(
            "data.heldout is not set, and without held-out trajectories nothing shows whether training helped; write "
            "data.heldout=FILE"
        )
    _make_base(recipe, console)
    check_checkpoint(recipe.model)
    from launch.run_folder import RunFolder

    plan = _plan(recipe, console)
    recipe = plan.recipe
    check_context(recipe.model, max(plan.data.lengths))
    console.print(
        f"{recipe.run}: {plan.schedule.num_steps} steps on {plan.world_size} ranks, {len(plan.data.ids)} sequences of "
        f"{min(plan.data.lengths):,} to {max(plan.data.lengths):,} tokens"
    )
    run = RunFolder(recipe, plan.data, plan.heldout)
    if not (_through_slime if through_slime else _embedded)(plan, run, console):
        return
    from launch import report
    from launch.sanity import check

    done = check.check(plan, run, console)
    console.print(check.table(done))
    console.print(f"report: {report.write(run)}   checkpoint: {run.hf}   {time.perf_counter() - started:.0f} s")
    check.refuse_failed(done, run)


def _embedded(plan: "Plan", run: "RunFolder", console: Console) -> bool:
    """Whether it trained to the end, with the export in `hf/`."""
    from torch.cuda import is_available

    from launch.megatron import engine
    from launch.preflight import check_memory
    from launch.run_folder import check_room

    if not is_available():
        check_memory(plan.recipe)
    # Weights, two moments and fp32 copies for every checkpoint kept, and one being written.
    weights = sum(f.stat().st_size for f in Path(plan.recipe.model.checkpoint).glob("*.safetensors"))
    check_room(plan.recipe, 4 * weights * (plan.recipe.engine.keep_last + 1))
    return engine.train(plan, run, console)


def _through_slime(plan: "Plan", run: "RunFolder", console: Console) -> bool:
    """As `_embedded`."""
    from launch.export import export
    from launch.slime import engine

    export(plan.recipe, engine.train(plan, run, console), run.hf, console)
    return True


def rehearse(recipe: Recipe, console: Console) -> None:
    """A step on the longest sequence, a save, a reload and a step after it, through slime."""
    if recipe.engine.name is not EngineName.slime:
        raise ConfigError(
            f"cluster={recipe.cluster.name} trains with the embedded engine, which needs no rehearsal; write MODEL=qwen3-32b, or "
            "engine=slime"
        )
    from launch.slime import rehearsal

    _make_base(recipe, console)
    check_checkpoint(recipe.model)
    plan = _plan(recipe, console)
    check_context(recipe.model, max(plan.data.lengths))
    done = rehearsal.rehearse(plan, console)
    console.print(rehearsal.table(done, plan))
    console.print(rehearsal.remark(done, plan))


def replay(recipe: Recipe, console: Console) -> None:
    """Repeats one step of a run, `step`, whole and sequence by sequence."""
    from launch.megatron import replay
    from launch.run_folder import RunFolder

    plan = _plan(recipe, console)
    if recipe.step is None or recipe.step > plan.schedule.num_steps:
        raise ConfigError(
            f"step={recipe.step}: the run has steps 1 to {plan.schedule.num_steps}; write step=N (make: STEP=N)"
        )
    replay.replay(plan, RunFolder(recipe, plan.data, plan.heldout), recipe.step, console)


def export(recipe: Recipe, console: Console) -> None:
    """Hugging Face folder of a run's newest checkpoint, or of `step`'s; the recipe is the run's own."""
    from launch import checkpoints, export

    run = run_folder(recipe)
    own = checkpoints.own_recipe(recipe)
    step, checkpoint = checkpoints.pick(run, recipe.step)
    export.export(own, checkpoint, checkpoints.target(run, step), console)


def parity(recipe: Recipe, console: Console) -> None:
    """Trains the tiny models in every layout of the embedded engine, beside one rank."""
    import tempfile

    from launch.megatron import parity as layouts
    from launch.megatron.ranks import Pool

    def table(title: str, last: str, found: Iterator[tuple[str, int, layouts.Difference, layouts.Limits]]) -> list[str]:
        head = f"| {title} | ranks | loss | gradient norm | gradients | weights |{last}"
        console.print(f"{head}\n{'|---' * (head.count('|') - 1)}|")
        failed = []
        for name, ranks, d, limits in found:
            figures = [d.loss, d.norm, d.gradient[0], d.weight[0], *([d.own_loss] if last else [])]
            console.print(f"| {name} | {ranks} | {' | '.join(f'{x:.1e}' for x in figures)} |")
            if not d.within(limits):
                failed.append(f"{name} ({d.gradient[1]}, {d.weight[1]})")
        console.print()
        return failed

    with tempfile.TemporaryDirectory() as folder, Pool() as pool:
        root = Path(folder)
        failed = table("layout", " loss, own Adam |", layouts.compared(pool, root, layouts.LAYOUTS))
        failed += table("bf16", "", layouts.compared_bf16(pool, root, layouts.BF16_LAYOUTS))
    if failed:
        raise TrainError(f"{len(failed)} layouts do not train as one rank does: {'; '.join(failed)}")


def bench(recipe: Recipe, console: Console) -> None:
    """Measures the assignment inside a step, planning, the embedded engine, and the data stage against the tokenizer alone."""
    import tempfile

    from data_prep import bench as data_bench
    from launch.megatron import bench as engine_bench
    from recipes import bench as recipe_bench
    from recipes import published

    modes = " | ".join(f"slime's {mode}" for mode in recipe_bench.SLIME)
    console.print(f"| makespan / bound: mean, worst | ours | {modes} | to reach |\n|---|---|---|---|---|---|")
    for row in recipe_bench.assignment_rows():
        console.print(f"| {' | '.join(row)} |")
    console.print("\n| planning | seconds |\n|---|---|")
    for row in itertools.chain(recipe_bench.planning_rows(), recipe_bench.command_rows()):
        console.print(f"| {' | '.join(row)} |")
    console.print("\n| TFLOP/s a GPU | published | predicted | error |\n|---|---|---|---|")
    for figures in published.rows():
        console.print(f"| {' | '.join(figures)} |")
    root = Path(recipe.cluster.root)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".bench.") as folder:
        console.print("\n| embedded engine | measured | to reach |\n|---|---|---|")
        for engine_row in engine_bench.rows(Path(folder)):
            console.print(f"| {' | '.join(engine_row)} |")
        console.print("\n| layout | ranks | tokens/s |\n|---|---|---|")
        for layout_row in engine_bench.layout_rows(Path(folder), engine_bench.names_here()):
            console.print(f"| {' | '.join(layout_row)} |")
    console.print()
    _make_base(recipe, console)
    data_bench.run(recipe, console)


def _plan(recipe: Recipe, console: Console) -> "Plan":
    """The recipe with its data, and with the layout settled where it is searched for."""
    from launch.plan import Plan

    packed = _packed(recipe, console)
    if recipe.layout.search:
        from recipes import planner

        recipe = planner.plan(recipe, _of_data(recipe, packed["training"])).recipe
    return Plan(recipe, packed["training"], packed.get("held out"))

def attach(recipe: Recipe, console: Console) -> None:
    """Shows the run's last job on the cluster from its first line, and watches it to its end."""
    from launch import submit

    submit.attach(recipe, console)


def stop(recipe: Recipe, console: Console) -> None:
    """Stops the run's last job on the cluster; training saves the step it is at."""
    from launch import submit

    submit.stop(recipe, console)


def slurm(recipe: Recipe, console: Console) -> None:
    """Prints the sbatch script that starts Ray on the nodes and runs the recipe there."""
    from launch import schedulers

    console.file.write(schedulers.slurm(recipe))


def kuberay(recipe: Recipe, console: Console) -> None:
    """Prints the RayJob manifest that runs the recipe on Kubernetes."""
    from launch import schedulers

    console.file.write(schedulers.kuberay(recipe))


def _packed(recipe: Recipe, console: Console) -> dict[str, "Dataset"]:
    """The data sets by name: `training`, and `held out` where the recipe names one. Says what comes twice."""
    from data_prep.dataset import overlap, prepare, repeated
    from data_prep.fetch import local

    _make_base(recipe, console)
    if recipe.data.heldout is not None:
        local(recipe.data.heldout, recipe.cluster.root, "data.heldout")  # before hours may go by
    packed = {"training": prepare(recipe, recipe.data.path)}
    if recipe.data.heldout is not None:
        packed["held out"] = prepare(recipe, recipe.data.heldout, "data.heldout")
        _warn(
            console,
            "held-out trajectories are among the training ones",
            overlap(packed["held out"], packed["training"]),
        )
    for name, one in packed.items():
        _warn(console, f"{name} trajectories say the same as an earlier one", repeated(one))
    return packed


def _warn(console: Console, what: str, pairs: list[tuple[str, str]]) -> None:
    if pairs:
        shown = ", ".join(f"{a} = {b}" for a, b in pairs[:5])
        console.print(f"{len(pairs)} {what}: {shown}{' …' if len(pairs) > 5 else ''}", style="yellow")


def _make_base(recipe: Recipe, console: Console) -> None:
    from launch.fetch import local_checkpoint

    local_checkpoint(recipe)
    if recipe.model.random_init:
        from launch.model import tiny

        if tiny.make(recipe):
            console.print(f"made {recipe.model.checkpoint} with random weights")


STAGES: dict[str, Stage] = {
    "train": train,
    "rehearse": rehearse,
    "replay": replay,
    "fetch": fetch,
    "export": export,
    "data": data,
    "inspect": inspect,
    "plan": plan,
    "check": check,
    "parity": parity,
    "bench": bench,
    "attach": attach,
    "stop": stop,
    "slurm": slurm,
    "kuberay": kuberay,
}


def find(named: list[str]) -> Stage:
    """The stage that the command line names, or `train`."""
    if len(named) > 1 or (named and named[0] not in STAGES):
        word = next((w for w in named if w not in STAGES), named[-1])
        near = difflib.get_close_matches(word, STAGES, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"'{word}' is no stage and not name=value; stages are {', '.join(STAGES)}, the nearest is {near}"
        )
    return STAGES[named[0]] if named else train


def show(stage: Stage, recipe: Recipe, console: Console) -> None:
    """`dry_run=true`: the resolved recipe and what would run; writes nothing but a cluster run's `job.json`."""
    console.print(to_yaml(recipe))
    console.print(f"would run: {stage.__name__} ({stage.__doc__})")
    console.print(
        f"  data     {recipe.data.path} and {recipe.data.heldout or 'nothing held out'}, packed into {recipe.data.out}"
    )
    if stage is train and recipe.engine.name is EngineName.slime:
        _show_job(recipe, console)
    elif stage is train:
        m = recipe.model
        layout = "layout searched for" if recipe.layout.search else f"data parallel {data_parallel(recipe)}"
        made = " (made with random weights if missing)" if m.random_init else ""
        console.print(f"  model    {m.name} from {m.checkpoint}{made}")
        console.print(
            f"  train    engine {recipe.engine.name.value}, {world_size(recipe)} ranks, {layout}, "
            f"{recipe.optim.epochs} epochs of steps of {recipe.optim.batch_size} trajectories"
        )
        console.print(f"  write    {run_folder(recipe)}")


def _show_job(recipe: Recipe, console: Console) -> None:
    """What would be submitted to the cluster, with the layout that the plan settles on; writes `job.json`."""
    from launch.slime import job
    from recipes import planner

    made = planner.plan(recipe, _sequences(recipe, console))
    path = job.write(made.recipe, made.schedule.num_steps, made.recipe.model.checkpoint)
    submitted = json.loads(path.read_text())
    console.print("  submit   python3 " + submitted["entrypoint"])
    for flag, values in _grouped(submitted["argv"]):
        console.print(f"             {flag} {' '.join(values)}".rstrip())
    for name, value in submitted["env_vars"].items():
        console.print(f"  env      {name}={value}")
    console.print(f"  job      {path}")


def _grouped(words: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Every flag with its values."""
    starts = [i for i, word in enumerate(words) if word.startswith("--")]
    for start, end in itertools.pairwise([*starts, len(words)]):
        yield words[start], words[start + 1 : end]
