"""What a machine cannot run is said before anything is read, made or fetched."""

import ctypes
import os
from types import SimpleNamespace

import psutil
import pytest

from launch.checks import Outcome
from launch.preflight import machine, recipe_checks
from launch.preflight.checklist import refuse
from recipes.compose.recipe import compose_recipe
from recipes.dimensions import parameters
from recipes.errors import PreflightError
from tests.launch.checks import red
from tests.launch.support import limi, ray_cluster


def row_of(*words):
    return machine.machine(compose_recipe([*words]))


@pytest.fixture
def gpus(monkeypatch):
    """Sets how many GPUs this machine has, with the packages of their kernels."""
    monkeypatch.setattr(machine, "lacks_kernel", lambda _: False)
    return lambda count: monkeypatch.setattr(machine, "gpus_here", lambda: count)


@pytest.fixture
def memory(monkeypatch):
    """Sets the memory of this machine, in GB."""
    here = psutil.virtual_memory()
    return lambda size: monkeypatch.setattr(psutil, "virtual_memory", lambda: here._replace(total=int(size * 1e9)))


def test_a_model_that_this_machine_cannot_hold_is_refused_with_the_figures_and_with_what_could(memory):
    memory(25)
    row = row_of("model=glm4.5", "cluster=local", "layout=data_parallel")
    with pytest.raises(PreflightError, match=r"glm4\.5 needs at least 8,468 GB on 2 ranks (.*\n)*.*model=qwen3-tiny"):
        refuse([row])
    assert row.limit == "25.0 GB of this machine"
    assert row.fix == (
        "write cluster=h100x64 cluster.address=http://HEAD:8265 of a Ray cluster with these GPUs; `make plan MODEL=glm4.5 "
        "cluster=h100x64` shows what it takes; here, model=qwen3-tiny trains on the CPU"
    )
    assert not row_of().failed


def test_of_a_layout_that_is_searched_for_nothing_is_counted_twice(memory):
    r = compose_recipe(["model=qwen3-4b", "cluster=local"])
    assert r.layout.search
    assert machine.least_memory(r) == pytest.approx(16 * parameters(r.model).total, rel=0.02)
    memory(60)
    assert row_of("model=qwen3-4b", "cluster=local").failed
    memory(70)
    assert not row_of("model=qwen3-4b", "cluster=local").failed


def test_a_model_that_is_trained_on_no_cluster_is_told_no_cluster(memory):
    memory(1)
    row = row_of("model.layers=2000")
    assert row.failed and row.fix == "write a smaller model; here, model=qwen3-tiny trains on the CPU"


def test_gpus_that_are_not_on_this_machine_are_refused(gpus):
    gpus(0)
    row = row_of("model=qwen3-8b", "run=ab")
    assert (row.figure, row.limit) == ("0 GPUs on this machine", "8 of cluster=h100x8, on 1 node")
    assert row.fix.startswith(
        "write cluster.address=http://HEAD:8265 of a Ray cluster with these GPUs; `make plan MODEL=qwen3-8b run=ab` shows"
    )
    gpus(4)
    assert row_of("model=qwen3-8b").fix.startswith("write cluster.gpus_per_node=4, or write cluster.address=http://")
    gpus(8)
    assert not row_of("model=qwen3-8b").failed
    row = row_of("model=glm4.5")
    assert row.failed and row.figure == "8 GPUs on this machine, but cluster.address is not set"
    assert "gpus_per_node" not in row.fix
    assert not row_of("model=qwen3-4b", "cluster=h100x1").failed, "the embedded engine's"


def test_the_plan_that_is_advised_keeps_what_is_not_of_machines(memory):
    memory(1)
    words = ["cluster=local", "layout=data_parallel", "cluster.gpus_per_node=4", "optim.lr=1e-5", "cluster.root=/a b"]
    assert (
        "`make plan MODEL=qwen3-4b optim.lr=1e-5 'cluster.root=/a b' cluster=h100x8`"
        in row_of("model=qwen3-4b", *words).fix
    )


@pytest.mark.parametrize(
    ("shown", "count"), [(None, 4), ("0,1", 2), ("", 0), ("-1", 0), ("0,1,2,3,4,5", 4), ("GPU-1f, GPU-2e", 2)]
)
def test_gpus_are_counted_as_the_driver_shows_them_to_this_process(monkeypatch, shown, count):
    def counted(pointer):
        pointer._obj.value = 4
        return 0

    driver = SimpleNamespace(nvmlInit_v2=lambda: 0, nvmlDeviceGetCount_v2=counted)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: {"libnvidia-ml.so.1": driver}[name])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert machine.gpus_here() == count
    driver.nvmlInit_v2 = lambda: 9  # a driver that is not loaded
    assert machine.gpus_here() == 0


def test_a_machine_without_a_driver_has_no_gpus(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert machine.gpus_here() == 0


@pytest.mark.run
@pytest.mark.parametrize(
    "words",
    [
        "train model=glm4.5",
        "train model=qwen3-8b engine=megatron",
        "rehearse model=glm4.5",
    ],
)
def test_no_stage_that_trains_tells_to_fetch_what_cannot_run_here(tmp_path, words):
    done = limi(*words.split(), f"cluster.root={tmp_path}", env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2, done.stderr
    assert "\n  machine: 0 GPUs on this machine" in done.stderr and "make plan MODEL=" in done.stderr
    assert "fetch" not in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_check_says_what_it_can_and_nothing_of_fetching(tmp_path):
    recipe = compose_recipe(["model=qwen3-32b", "cluster=local", "layout=data_parallel", f"cluster.root={tmp_path}"])
    rows = {row.name: row for row in recipe_checks.recipe_rows(recipe, lambda: pytest.fail("asks for the data"))}
    assert red(rows)[0] == "machine" and next(iter(rows)) == "machine"
    assert "data" not in red(rows) and "model" not in red(rows)
    assert not any("fetch" in row.fix for row in rows.values())
    assert rows["model"].figure == rows["tensors"].figure == "not known until what failed passes"
    assert not rows["paths"].failed and rows["disk"].outcome is not Outcome.shown


def test_a_check_of_a_cluster_that_this_machine_is_not_starts_no_ray(tmp_path):
    done = limi("check", "model=glm4.5", f"cluster.root={tmp_path}")
    assert done.returncode == 2
    assert "Checking the cluster" not in done.stdout and "fetch" not in done.stderr
    assert "\n  machine: " in done.stderr


@pytest.mark.parametrize(
    ("words", "found", "fix"),
    [
        (["model=qwen3-32b", "cluster=h100x1"], "qwen3-32b needs at least 197 GB on 1 rank (weights and gradients)",
         "write cluster=h100x64 cluster.address="),
        (["model=qwen3-32b", "cluster=h100x1", "layout=data_parallel"],
         "qwen3-32b needs at least 593 GB on 1 rank (weights, gradients and Adam's moments)", "write cluster=h100x64"),
        (["model=glm4.5", "cluster=h100x8"], "glm4.5 needs at least 2,117 GB on 8 ranks (weights and gradients)",
         "write cluster=h100x64 cluster.address="),
        (["model=glm4.5", "model.layers=400"], "glm4.5 needs at least 9,", "write a larger cluster.nodes, or a smaller model"),
    ],
)  # fmt: skip
def test_gpus_that_cannot_hold_the_model_are_refused_however_many_are_here(gpus, words, found, fix):
    gpus(64)
    row = row_of(*words)
    assert row.failed and row.figure.startswith(found) and row.fix.startswith(fix)
    assert " x h100" in row.limit


@pytest.mark.parametrize("model", ["qwen3-4b", "qwen3-8b", "qwen3-14b", "qwen3-32b", "glm4.5-air", "glm4.5"])
def test_every_model_fits_the_cluster_that_its_file_names(monkeypatch, model):
    """What advice names is not refused there."""
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setattr(machine, "_gpus_of_cluster", lambda: 64)
    assert not row_of(f"model={model}").failed
    monkeypatch.setattr(machine, "_gpus_of_cluster", lambda: 7)
    row = row_of(f"model={model}")
    assert row.failed and row.figure == "7 GPUs in the Ray cluster of this job" and "add nodes to it" in row.fix


@pytest.mark.slow
def test_a_job_counts_the_gpus_of_its_cluster(tmp_path):
    from ray.job_submission import JobSubmissionClient

    with ray_cluster(tmp_path, gpus=8) as cluster:
        client = JobSubmissionClient(cluster.address)
        for model, says in (("qwen3-8b", None), ("glm4.5", "8 GPUs in the Ray cluster of this job (limit: 64 of")):
            words = f"model={model} cluster.root={tmp_path}"
            done = limi("train", *words.split(), f"cluster.address={cluster.address}", env=cluster.env)
            assert done.returncode != 0
            assert (
                (says in done.stdout + done.stderr)
                if says
                else ("make fetch MODEL=qwen3-8b" in done.stdout + done.stderr)
            )
        assert client.list_jobs()


def test_a_kernel_whose_package_is_missing_is_refused_before_the_run(monkeypatch):
    monkeypatch.setattr(machine, "gpus_here", lambda: 1)
    words = ("model=qwen3-4b", "cluster=h100x1", "engine=megatron", "layout=data_parallel", "layout.recompute=full")
    for kernel, there, fix in (
        ("flash4", None, "write gpu.attention=cudnn, or install it: `make setup LOCK=constraints-gpu.txt` does"),
        ("flash4", object(), ""),
        ("cudnn", None, ""),
    ):
        monkeypatch.setattr(machine.importlib.util, "find_spec", lambda _, there=there: there)
        row = row_of(*words, "layout.optimizer_state=offloaded", f"gpu.attention={kernel}")
        assert row.fix == fix and row.figure.startswith("1 GPUs on this machine"), row
