"""`make bench-gpu` without a GPU: what it plans, and all that it measures, really run on little."""

import io
import json
import signal

import pytest
from rich.console import Console

from launch.bench.gpu import cases, measurement, run, software, table
from launch.bench.gpu.cases import CASES, PROFILE, SIDES, Case, Planned, chosen_cases, planned
from recipes.compose.recipe import compose_recipe
from recipes.errors import ConfigError, PreflightError, TrainError
from recipes.plan import planner
from recipes.plan.memory import Verdict
from recipes.plan.search import Sequences
from recipes.plan.shown.plan_words import gigabytes
from tests.launch.support import called

SMALL = "model.layers=2 model.hidden=64 model.ffn=128 model.heads=4 model.kv_heads=2 model.head_dim=16 model.vocab=512"
ROPE = "model.native_context=256 model.rope_factor=2"
TINY = Case("tiny", "packed", (300, 200, 500), words=("layout.max_tokens_per_gpu=600",))
SHORT = Case("tiny", "short", (200,), steps=1)
ALL = ",".join(SIDES)


@pytest.fixture
def tiny(monkeypatch):
    """Cases of a tiny shape, on a machine that says it has the GPU."""
    monkeypatch.setitem(cases.SHAPES, "tiny", f"{SMALL} {ROPE}")
    here = software.environment() | {"gpu": "NVIDIA H100 80GB HBM3"}
    monkeypatch.setattr(run, "environment_here", lambda: dict(here))
    return here


def bench(tmp_path, *words, of=(TINY, SHORT)):
    console = Console(file=io.StringIO(), width=400)
    run.bench_gpu(compose_recipe([f"cluster.root={tmp_path}", *words]), console, of)
    return console.file.getvalue()


@pytest.mark.parametrize("cluster", ["h100x1", "h200x1"])
def test_every_row_fits_one_gpu_and_one_call(cluster):
    assert len({case.key for case in CASES}) == len(CASES)
    rows = [planned(case, [f"cluster={cluster}"]) for case in CASES]
    for one in rows:
        assert one.plan.verdict is Verdict.fits, one.case.name
        assert max(one.part_seconds(side) for side in SIDES) < 540
        assert sorted(n for batch in one.batches for n in batch) == sorted(one.case.sequences)
    calls = table.calls_of(rows, SIDES, 540)
    assert [n for numbers in calls for n in numbers] == sorted(n for numbers in calls for n in numbers)
    assert [len(one.batches) for one in rows if one.case.label == "LIMI-like pack"] == [1]
    assert set(cases.PUBLISHED) <= {case.key for case in CASES}


def test_rows_sides_and_steps_are_chosen_on_the_command_line():
    def chosen(*words):
        bench = compose_recipe([*words]).bench
        return [(case.key, case.steps) for case in chosen_cases(bench)], cases.chosen_sides(bench)

    assert chosen() == ([(case.key, case.steps) for case in CASES], SIDES)
    words = ("bench.rows=4B-8k,4B-32k", "bench.sides=theirs,profile", "bench.steps=3")
    assert chosen(*words) == ([("4B-8k", 3), ("4B-32k", 3)], ("theirs", PROFILE))
    for word, said in (
        ("bench.rows=4B-9k", "the rows are 4B-32k, 4B-8k"),
        ("bench.sides=transformers", "the sides are roofline, ours, theirs, profile"),
        ("bench.steps=0", "write bench.steps=1"),
    ):
        with pytest.raises(ConfigError, match=said):
            chosen(word)
    done = called("train", "bench.rows=4B-8k")
    assert done.returncode == 2 and "bench.rows is an option of bench-gpu" in done.stderr


def test_the_dry_run_shows_shapes_memory_and_calls_in_order():
    done = called("bench-gpu", "dry_run=true")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[1:]] == [case.name for case in CASES]
    longest = planned(CASES[2], ["cluster=h200x1"])
    figures = f"| 1 | linear again, offloaded | {gigabytes(longest.allocated)} |"
    assert "h200" in lines[0] and figures in lines[3]
    assert "Nothing here is measured" in done.stdout
    done = called("bench-gpu", "dry_run=true", "bench.rows=4B-8k", "bench.sides=ours")
    assert done.stdout.count("\n| ") == 1 and "Each row is measured as ours," in done.stdout


@pytest.mark.run
def test_without_the_gpu_it_says_so(monkeypatch):
    here = run.environment_here()
    monkeypatch.setattr(run, "environment_here", lambda: dict(here))
    with pytest.raises(PreflightError, match="needs H100 or H200, but this machine has no GPU"):
        run.bench_gpu(compose_recipe([]), Console(file=io.StringIO()))
    with pytest.raises(PreflightError, match="needs H200, but this machine has no GPU"):
        run.bench_gpu(compose_recipe(["cluster=h200x1"]), Console(file=io.StringIO()))
    with pytest.raises(ConfigError, match="measures one GPU"):
        run.show_bench_gpu(compose_recipe(["cluster=h100x8"]), Console(file=io.StringIO()))


def figures(seconds, **others):
    return {"environment": {"torch": "x"}, "seconds": seconds, **others}


def test_a_cut_call_loses_the_step_at_hand_and_a_later_one_goes_on(tmp_path, tiny, monkeypatch):
    """Real folders; the processes that measure are played."""
    done, cuts = [], ["ours"]

    def process(command, **others):
        side, folder = command[-2], measurement.Path(command[-1])
        rates = dict.fromkeys(("products", "attention", "attention backward"), 1.0)
        new = {"environment": tiny, "seconds": [], "peak": 1, "attention": "flash4", "tflops": rates}
        known = run.results(folder).get(side, new)
        seconds = [*known["seconds"], 1.0]
        (folder / f"{side}.json").write_text(json.dumps(known | {"seconds": seconds}))
        done.append((side, len(seconds)))
        if cuts and side == cuts[0]:
            cuts.pop()
            raise run.subprocess.TimeoutExpired(command, 1)
        status = -signal.SIGKILL if side == "theirs" else 0
        return run.subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(run.subprocess, "run", process)
    with pytest.raises(TrainError, match=r"2 measurements failed: tiny, packed, ours: .*tiny, packed, theirs: "):
        bench(tmp_path, "bench.rows=tiny-packed", f"bench.sides={ALL}", "cluster.host_memory_gb=100")
    assert done == [("roofline", 1), ("ours", 1), ("theirs", 1)]
    done.clear()
    said = bench(tmp_path, "bench.rows=tiny-packed", f"bench.sides={ALL}", "cluster.host_memory_gb=137")
    assert done == [("roofline", 2), ("ours", 2)], (
        "another memory of the host removes nothing; a killed process is not repeated"
    )
    assert "theirs: its process was ended by SIGKILL" in said
    done.clear()
    bench(tmp_path, "bench.rows=tiny-packed", "bench.sides=ours", "bench.steps=3")
    assert done == [("ours", 3)], "one step more"
    done.clear()
    bench(tmp_path, "bench.rows=tiny-packed", "bench.sides=ours", "gpu.attention=cudnn", "bench.steps=1")
    folder = tmp_path / "bench-gpu" / "h100x1" / TINY.key
    assert done == [("ours", 1)] and {*run.results(folder)} == {"ours", "theirs"}, "another kernel: not transformers'"
    tiny["torch"] = "0"
    done.clear()
    bench(tmp_path, "bench.rows=tiny-packed", "bench.sides=roofline")
    assert {*run.results(folder)} == {"roofline"}, "another version"


@pytest.mark.slow
def test_calls_measure_what_is_left_and_nothing_twice(tmp_path, tiny):
    """The processes and the engine are the real ones."""
    first = bench(tmp_path, "limit_s=30", of=(SHORT,))
    assert "'tiny, short, ours' takes about" in first and "rerun the same command to continue" in first
    (folder,) = (tmp_path / "bench-gpu" / "h100x1").iterdir()
    assert {*run.results(folder)} == {"roofline"}
    before = (folder / "roofline.json").stat().st_mtime_ns
    whole = bench(tmp_path, of=(SHORT,))
    found = run.results(folder)
    assert {*found} == {*SIDES} and found["ours"]["loss"] == pytest.approx(found["theirs"]["loss"], abs=6e-3)
    row = next(line for line in whole.splitlines() if line.startswith("| tiny, short |"))
    assert row in whole.partition("| row |")[0], "as soon as it is whole"
    assert row in bench(tmp_path, of=(SHORT,)).partition("| row |")[2]
    assert (folder / "roofline.json").stat().st_mtime_ns == before
    profiled = bench(tmp_path, f"bench.sides={PROFILE}", of=(SHORT,))
    assert "One step of tiny, short" in profiled and "aten::mm" in profiled


@pytest.mark.slow
def test_a_failed_measurement_is_named_and_the_others_are_made(tmp_path, tiny, monkeypatch):
    """A word that the engine refuses."""
    wrong = Case("tiny", "packed", TINY.sequences, words=TINY.words)
    real = run.prepared

    def prepared(*arguments):
        folder = real(*arguments)
        text = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(text.replace("weight_decay: 0.1", "weight_decay: -1"))
        return folder

    monkeypatch.setattr(run, "prepared", prepared)
    with pytest.raises(TrainError, match=r"measurements failed.*tiny, packed, theirs: .*theirs\.log"):
        bench(tmp_path, "bench.steps=1", of=(wrong,))
    found = run.results(tmp_path / "bench-gpu" / "h100x1" / TINY.key)
    assert "Invalid weight_decay" in found["theirs"]["failed"] and found["roofline"]["seconds"]


@pytest.mark.slow
def test_both_sides_train_the_same(tmp_path):
    """In fp32: loss of a step whose micro-batches are packed on one side, and everything offloaded."""
    words = f"model=qwen3-4b {SMALL} {ROPE} cluster=local engine=megatron cluster.gpus_per_node=1 layout=data_parallel"
    layout = "layout.recompute=linear layout.offload=true layout.optimizer_state=offloaded layout.loss_chunk=256"
    steps = "layout.max_tokens_per_gpu=600 optim.batch_size=3 optim.epochs=2"
    recipe = compose_recipe([*words.split(), *layout.split(), *steps.split(), f"cluster.root={tmp_path}"])
    plan = planner.make_plan(recipe, Sequences(range(3), TINY.sequences, "drawn at random"))
    measurement.write_case(tmp_path, Planned(TINY, plan))
    for side in SIDES:
        assert run.measured(tmp_path, side, 120), (tmp_path / f"{side}.log").read_text()
    found = run.results(tmp_path)
    assert found["ours"]["loss"] == pytest.approx(found["theirs"]["loss"], abs=2e-6)
    assert len(found["ours"]["seconds"]) == len(found["theirs"]["seconds"]) == TINY.steps
    assert all(rate > 0 for rate in found["roofline"]["tflops"].values())
