"""SGLang's command line and environment: what the real SGLang 0.5.23 takes, for every model on its default cluster."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from launch.serving import sglang_command
from recipes.compose.recipe import compose_recipe
from recipes.errors import PreflightError
from recipes.paths import CONF
from tests.conftest import REPO
from tests.launch.support import limi

MODELS = sorted(p.stem for p in (CONF / "model").glob("*.yaml"))
NAMES = [
    "tp_size",
    "ep_size",
    "context_length",
    "dtype",
    "tool_call_parser",
    "reasoning_parser",
    "host",
    "speculative_algorithm",
]


def base(folder, recipe, **config):
    """A checkpoint's folder as far as the command line looks at it."""
    folder.mkdir(exist_ok=True)
    config = {"max_position_embeddings": recipe.model.max_position} | config
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def parsed(lines, names=NAMES):
    """What SGLang's parser makes of these command lines, each after `-m sglang.launch_server`."""
    env = sglang_command.environment(compose_recipe([]), Path("unused"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.launch.serving.parse_args", *names], env=env, cwd=REPO, capture_output=True, text=True,
        input=json.dumps([line[3:] for line in lines]),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("ARGS ")]


@pytest.mark.run
def test_sglang_s_own_parser_takes_the_words_of_every_model_on_its_default_cluster(tmp_path):
    lines = {}
    for name in MODELS:
        words = [f"model={name}", *(["cluster=h200x8"] if name == "glm4.5" else [])]
        recipe = compose_recipe(words)
        line = sglang_command.command(recipe, base(tmp_path / name, recipe), 30000, True)
        assert line[1:3] == ["-m", "sglang.launch_server"]
        assert "--trust-remote-code" not in line
        lines[name] = line
    found = dict(zip(lines, parsed(lines.values()), strict=True))
    assert {f["host"] for f in found.values()} == {"127.0.0.1"}
    assert {f["speculative_algorithm"] for f in found.values()} == {"None"}
    seen = {name: tuple(f[key] for key in NAMES[:6]) for name, f in found.items()}
    long = "155655"
    assert seen == {
        "qwen3-tiny": ("1", "1", "None", "float32", "qwen25", "qwen3"),
        "glm4.5-tiny": ("1", "1", "None", "float32", "glm45", "glm45"),
        "qwen3-4b": ("1", "1", long, "bfloat16", "qwen25", "qwen3"),
        "qwen3-8b": ("1", "1", long, "bfloat16", "qwen25", "qwen3"),
        "qwen3-14b": ("1", "1", long, "bfloat16", "qwen25", "qwen3"),
        "qwen3-32b": ("2", "1", long, "bfloat16", "qwen25", "qwen3"),
        "glm4.5-air": ("4", "4", long, "bfloat16", "glm45", "glm45"),
        "glm4.5": ("8", "8", long, "bfloat16", "glm45", "glm45"),
    }


def test_a_model_that_one_node_cannot_hold_is_refused_with_what_to_type(tmp_path):
    recipe = compose_recipe(["model=glm4.5", "cluster.nodes=1"])
    with pytest.raises(
        PreflightError, match=r"8 x h100 offer 5\d\d GB.*write its sanity\.url=http://HOST:PORT"
    ) as error:
        sglang_command.command(recipe, base(tmp_path / "base", recipe), 1, True)
    assert "serving glm4.5 needs 76" in str(error.value)  # 706 GB of weights, 59 GB of keys and values


@pytest.mark.run
def test_a_model_of_two_nodes_is_served_by_two_processes_that_meet(tmp_path, monkeypatch):
    recipe = compose_recipe(["model=glm4.5"])
    folder = base(tmp_path / "base", recipe)
    with pytest.raises(PreflightError, match="needs 16 x h100 on 2 nodes to serve glm4.5; write cluster.address="):
        sglang_command.check_machine(recipe, folder)
    monkeypatch.setenv(sglang_command.MEETING, "10.0.0.1:4711 2")
    lines = [sglang_command.command(recipe, folder, 30000, True, rank) for rank in (0, 1)]
    names = ["nnodes", "node_rank", "dist_init_addr", "tp_size", "ep_size", "host"]
    found = parsed(lines, names)
    assert [tuple(one.values()) for one in found] == [
        ("2", rank, "10.0.0.1:4711", "16", "16", "127.0.0.1") for rank in ("0", "1")
    ]
    monkeypatch.setattr(sglang_command, "gpus_here", lambda: 8)
    sglang_command.check_machine(recipe, folder)


def test_sanity_tp_is_taken_as_it_is_and_held_against_heads_and_gpus(tmp_path):
    recipe = compose_recipe(["model=qwen3-32b", "cluster.nodes=1", "sanity.tp=8"])
    folder = base(tmp_path / "base", recipe)
    line = sglang_command.command(recipe, folder, 1, True)
    assert line[line.index("--tp-size") + 1] == "8"
    for wrong in (3, 16):
        with pytest.raises(
            PreflightError, match=rf"sanity\.tp={wrong} is not possible with 64 attention heads.*write sanity\.tp=8"
        ):
            sglang_command.command(
                compose_recipe(["model=qwen3-32b", "cluster.nodes=1", f"sanity.tp={wrong}"]), folder, 1, True
            )
    on_cpu = compose_recipe([])
    on_cpu.sanity.tp = 2  # which the command line refuses
    with pytest.raises(PreflightError, match=r"sanity\.tp=2 needs GPUs"):
        sglang_command.command(on_cpu, folder, 1, True)


def yarn(factor, native=32768):
    return {"rope_parameters": {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": native}}


@pytest.mark.parametrize(
    ("words", "config", "context", "beyond"),
    [
        (["model=glm4.5-air"], {}, 155_655, True),  # unscaled, as released
        (["model=qwen3-32b"], {"max_position_embeddings": 155_648, **yarn(4.75)}, 155_655, True),  # an export
        (["model=qwen3-32b"], {"max_position_embeddings": 40_960, **yarn(4.75)}, 155_655, True),  # a release's file
        (["model=qwen3-32b", "data.max_tokens=8000"], {}, 40_960, False),
        (["model=qwen3-4b", "model.rope=native", "model.rope_factor=1"], {}, 40_960, False),
    ],
)
def test_the_context_is_the_config_s_or_what_training_reached(tmp_path, words, config, context, beyond):
    recipe = compose_recipe(words)
    folder = base(tmp_path / "base", recipe, **config)
    line = sglang_command.command(recipe, folder, 1, True)
    assert line[line.index("--context-length") + 1] == str(context)
    env = sglang_command.environment(recipe, folder)
    assert env.get("SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN") == ("1" if beyond else None)
    assert "SGLANG_USE_CPU_ENGINE" not in env and env.get("PYTHONPATH") == os.environ.get("PYTHONPATH")


def test_a_yarn_that_does_not_reach_what_was_trained_is_refused(tmp_path):
    recipe = compose_recipe(["model=qwen3-32b"])
    folder = base(tmp_path / "base", recipe, max_position_embeddings=40_960, **yarn(4.0))
    with pytest.raises(
        PreflightError, match=r"exceeds the 131,072 tokens that the YaRN of .*write data\.max_tokens=131072"
    ):
        sglang_command.command(recipe, folder, 1, True)


def test_on_gpus_the_engine_s_python_serves(tmp_path):
    recipe = compose_recipe(["model=qwen3-4b", "engine.python=/opt/python3"])
    assert sglang_command.command(recipe, base(tmp_path / "base", recipe), 1, True)[0] == "/opt/python3"
    on_cpu = compose_recipe([])
    on_cpu.engine.python = "/opt/python3"  # which the command line refuses
    assert sglang_command.command(on_cpu, tmp_path / "base", 1, True)[0] == sys.executable


def test_on_a_cpu_the_kernels_are_a_stand_in_even_where_they_are_installed(tmp_path):
    (tmp_path / "sgl_kernel.py").write_text("raise ImportError('libcuda.so.1: cannot open shared object file')\n")
    (tmp_path / "torchvision.py").write_text("__version__ = 'installed'\n")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(sglang_command.STAND_INS), str(tmp_path)))}
    program = Path(__file__).with_name("kernels_here.py")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, env=env)
    assert done.stdout == "0.0.0 installed\n", done.stderr


def test_a_machine_that_cannot_serve_the_model_is_refused_with_the_figures(tmp_path, monkeypatch):
    recipe = compose_recipe(["model=qwen3-32b"])
    folder = base(tmp_path / "hf", recipe)
    says = "SGLang needs 2 x h100 to serve qwen3-32b, but this machine has 1 GPUs; run the command on a machine that has them"
    for count in (1, 2):
        monkeypatch.setattr(sglang_command, "gpus_here", lambda count=count: count)
        if count == 2:
            sglang_command.check_machine(recipe, folder)
            continue
        with pytest.raises(PreflightError, match=re.escape(says)):
            sglang_command.check_machine(recipe, folder)
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(total=25 * 10**9))
    recipe = compose_recipe(["model=qwen3-4b", "cluster=local", "layout=data_parallel"])
    says = "SGLang needs 35 GB to serve qwen3-4b on a CPU (fp32 weights and a cache of 65,536 tokens), but this machine has 25 GB"
    with pytest.raises(PreflightError, match=re.escape(says)):
        sglang_command.check_machine(recipe, folder)
    sglang_command.check_machine(compose_recipe([]), folder)


@pytest.mark.run
def test_serve_and_sanity_say_at_once_that_no_server_starts_here(bases, tmp_path):
    words = [f"checkpoint={bases['qwen3-tiny']}", "model=qwen3-32b", f"cluster.root={tmp_path}"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = limi("serve", *words, env=env)
    assert done.returncode == 2
    assert "PreflightError: SGLang needs 2 x h100 to serve qwen3-32b, but this machine has 0 GPUs; " in done.stderr
    assert "starting" not in done.stdout and not list(tmp_path.iterdir())
    done = limi("sanity", *words, env=env)
    assert done.returncode == 2
    said = "warning: no server can be started, so only the files are checked: SGLang needs 2 x h100 to serve qwen3-32b"
    assert done.stdout.startswith(said)
    assert "model.checkpoint=Qwen/Qwen3-32B is not on this machine" in done.stderr
