"""`make bench-gpu` without a GPU: what it plans, and all that it measures, really run on little."""

import io

import pytest
from rich.console import Console

from launch.bench.gpu import cases, measurement, run, software, table
from launch.bench.gpu.cases import CASES, PARTS, Case, Planned, planned
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
BESIDE = Case("tiny", "beside the CPU", (200,), steps=1, parts=("ours", "cpu"))


@pytest.fixture
def tiny(monkeypatch):
    """Cases of a tiny shape, on a machine that says it has the GPU."""
    monkeypatch.setitem(cases.SHAPES, "tiny", f"{SMALL} {ROPE}")
    here = software.environment() | {"gpu": "NVIDIA H100 80GB HBM3"}
    monkeypatch.setattr(run, "environment_here", lambda: dict(here))
    return here


def bench(tmp_path, *words, of=(TINY, BESIDE)):
    console = Console(file=io.StringIO(), width=400)
    run.bench_gpu(compose_recipe([f"cluster.root={tmp_path}", *words]), console, of)
    return console.file.getvalue()


@pytest.mark.parametrize("cluster", ["h100x1", "h200x1"])
def test_every_row_fits_one_gpu_and_one_call(cluster):
    assert len({case.key for case in CASES}) == len(CASES)
    rows = [planned(case, [f"cluster={cluster}"]) for case in CASES]
    for one in rows:
        assert one.plan.verdict is Verdict.fits, one.case.name
        assert max(one.part_seconds(part) for part in one.case.parts) < 540
        assert sorted(n for batch in one.batches for n in batch) == sorted(one.case.sequences)
    calls = table.calls_of(rows, 540)
    assert [n for numbers in calls for n in numbers] == sorted(n for numbers in calls for n in numbers)
    assert [len(one.batches) for one in rows if one.case.label == "LIMI-like pack"] == [1]


def test_the_dry_run_shows_shapes_memory_and_calls_in_order():
    done = called("bench-gpu", "dry_run=true")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[1:]] == [case.name for case in CASES]
    longest = planned(CASES[1], ["cluster=h200x1"])
    figures = f"| 1 | linear again, offloaded | {gigabytes(longest.allocated)} |"
    assert "h200" in lines[0] and figures in lines[2]
    assert "Nothing here is measured" in done.stdout


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


@pytest.mark.slow
def test_calls_measure_what_is_left_and_nothing_twice(tmp_path, tiny):
    """The processes and the engine are the real ones; on a CPU, the first in bf16."""
    first = bench(tmp_path, "limit_s=30", of=(BESIDE,))
    assert "'tiny, beside the CPU, cpu' takes about" in first and "rerun the same command to continue" in first
    (folder,) = (tmp_path / "bench-gpu" / "h100x1").iterdir()
    assert {*run.results(folder)} == {"ours"}
    before = (folder / "ours.json").stat().st_mtime_ns
    whole = bench(tmp_path, of=(BESIDE,))
    found = run.results(folder)
    assert found["ours"]["loss"] == pytest.approx(found["cpu"]["loss"], abs=cases.BAND)
    assert found["ours"]["loss"] != found["cpu"]["loss"], "one in bf16, one in fp32"
    sentence = next(line for line in whole.splitlines() if line.startswith("tiny, beside the CPU: loss"))
    assert sentence in whole.partition("| row |")[0], "as soon as it is whole"
    assert sentence in bench(tmp_path, of=(BESIDE,)).partition("| row |")[2]
    assert (folder / "ours.json").stat().st_mtime_ns == before
    tiny["transformers"] = "0"
    assert "rerun the same command to continue" in bench(tmp_path, "limit_s=30", of=(BESIDE,)), (
        "another version: measured anew"
    )
    assert not (folder / "cpu.json").exists()
    bench(tmp_path, "layout.recompute=full", "limit_s=30", of=(BESIDE,))
    assert not (folder / "cpu.json").exists(), "of another recipe"


@pytest.mark.slow
def test_a_failed_measurement_is_named_and_the_others_are_made(tmp_path, tiny):
    in_the_way = tmp_path / "bench-gpu" / "h100x1" / TINY.key / "ours.json"
    in_the_way.mkdir(parents=True)
    with pytest.raises(TrainError, match=r"1 measurements failed.*tiny, packed, ours: .*ours\.log"):
        bench(tmp_path, of=(TINY,))
    assert {*run.results(in_the_way.parent)} == {"roofline", "transformers"}
    assert "IsADirectoryError" in in_the_way.with_suffix(".log").read_text()


@pytest.mark.slow
def test_both_sides_train_the_same(tmp_path):
    """In fp32: loss of a step whose micro-batches are packed on one side, and everything offloaded."""
    words = f"model=qwen3-4b {SMALL} {ROPE} cluster=local engine=megatron cluster.gpus_per_node=1 layout=data_parallel"
    layout = "layout.recompute=linear layout.offload=true layout.optimizer_state=offloaded layout.loss_chunk=256"
    steps = "layout.max_tokens_per_gpu=600 optim.batch_size=3 optim.epochs=2"
    recipe = compose_recipe([*words.split(), *layout.split(), *steps.split(), f"cluster.root={tmp_path}"])
    plan = planner.make_plan(recipe, Sequences(range(3), TINY.sequences, "drawn at random"))
    measurement.write_case(tmp_path, Planned(TINY, plan))
    for part in PARTS:
        assert run.measured(tmp_path, part, 120), (tmp_path / f"{part}.log").read_text()
    found = run.results(tmp_path)
    assert found["ours"]["loss"] == pytest.approx(found["transformers"]["loss"], abs=2e-6)
    assert len(found["ours"]["seconds"]) == len(found["transformers"]["seconds"]) == TINY.steps
    assert all(rate > 0 for rate in found["roofline"]["tflops"].values())


def test_the_table_of_figures_that_are_there():
    """Made-up figures of every kind."""
    rows = [planned(case, ["cluster=h200x1"]) for case in CASES]
    at = {"environment": {"torch": "x"}}
    least = {
        "seconds": {"products": 4.0, "attention": 4.0, "attention backward": 2.0},
        "tflops": {"products": 700.0, "attention": 500.0, "attention backward": 400.0},
        **at,
    }
    ours = {"seconds": [12.5, 12.5], "loss": 11.9, "peak": 1e11, **at}
    oom = {"out_of_memory": "CUDA out of memory", **at}
    line = table.line(rows[0], {"ours": ours, "transformers": ours | {"seconds": [25.0]}, "roofline": least})
    assert "| 10,486 | 5,243 | 2.00 × | 80% |" in line
    assert "| out of memory | – |" in table.line(rows[1], {"ours": ours, "transformers": oom, "roofline": least})
    assert table.line(rows[2], {}).count("not measured") == 2
    assert "not measured" in table.line(rows[-1], {})
    assert "apart" in table.line(rows[-1], {"ours": ours, "cpu": ours | {"loss": 11.8}})
    (text,) = table.calibrated([(row, {"ours": ours, "roofline": least}) for row in rows])
    assert f"matmul_efficiency={700 / 989.4:.2f}" in text and "4B, 152k" in text.partition("predicted")[2]
    assert table.calibrated([(rows[0], {"ours": ours, "roofline": least})]) == []
