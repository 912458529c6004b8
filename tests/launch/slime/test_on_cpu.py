"""The real, unmodified slime on CPU ranks, with the reference folder's CPU accelerator: it trains the planned steps as the embedded
engine does."""

import ast
import json
import re
import subprocess
from pathlib import Path

import pytest

from launch.plan import Plan
from launch.slime import job
from tests.launch.slime.support import pinned
from tests.launch.support import ranks_of, recipe_of

STEPS = 5
# What slime's image has and a CPU has not.
_NOT_FUSED = ("rope", "gradient-accumulation", "masked-softmax", "bias-swiglu", "bias-dropout")
ON_CPU = [
    *("--distributed-backend", "gloo", "--transformer-impl", "local", "--spec", "slime_cpu.spec", "layer_spec"),
    *("--no-persist-layer-norm", "--use-cpu-initialization", "--cp-comm-type", "all_gather"),
    *(f"--no-{name}-fusion" for name in _NOT_FUSED),
]
NOT_ON_CPU = ("--moe-permute-fusion",)
QWEN, GLM = ["model=qwen3-tiny"], ["model=glm4.5-tiny", "layout=data_parallel"]
# Model, ranks, layout, and the largest difference of a loss over five steps: GLM's tokens change experts by rounding.
LAYOUTS = {
    "Qwen3 one rank": (QWEN, 1, "", 1e-3),
    "Qwen3 DP2": (QWEN, 2, "", 1e-3),
    "Qwen3 PP2": (QWEN, 2, "layout.pp=2 model.layers=4", 1e-3),
    "Qwen3 CP2": (QWEN, 2, "layout.cp=2", 1e-3),
    "Qwen3 TP2": (QWEN, 2, "layout.tp=2", 1e-3),
    "GLM EP2": (GLM, 2, "layout.ep=2", 1e-2),
}


def slime(root: Path, run: str, words: list[str], ranks: int) -> list[dict[str, float]]:
    """What slime logs of every step."""
    python, env = pinned()
    plan = Plan(*recipe_of(root, "engine=slime", f"run={run}", *words))
    path = job.write(plan.recipe, STEPS)
    plan.write(path.parent / "plan.json")
    argv = [w for w in json.loads(path.read_text())["argv"] if w not in NOT_ON_CPU]
    argv[argv.index("--attention-backend") + 1] = "unfused"
    env |= {
        "PYTHONPATH": f"{env['PYTHONPATH']}:{Path(__file__).parents[3]}", job.RUN: str(path.parent), **job.DEFAULTS,
        "SLIME_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
        "TENSORBOARD_DIR": str(path.parent / "tensorboard"), "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_TOKEN": "of-this-test",
    }  # fmt: skip
    script = Path(__file__).parent / "train_on_cpu.py"
    done = subprocess.run(
        [python, str(script), str(ranks)],
        input=json.dumps([*argv, *ON_CPU]),
        capture_output=True,
        text=True,
        env=env,
        cwd=path.parent,
        timeout=240,
    )
    steps = re.findall(r"step \d+: (\{'train/loss'.*?\})", done.stdout + done.stderr)
    assert len(steps) == STEPS, (done.stdout + done.stderr)[-5000:]
    return [ast.literal_eval(line) for line in steps]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_slime_trains_the_planned_steps_as_the_embedded_engine_does(root, name):
    model, ranks, layout, band = LAYOUTS[name]
    # One base for all layouts of a shape.
    depth = "4" if "layers=4" in layout else "own"
    words = [
        *model, f"cluster.gpus_per_node={ranks}", *layout.split(),
        f"model.checkpoint={root}/models/slime-{model[0].partition('=')[2]}-{depth}",
    ]  # fmt: skip
    found = slime(root, f"slime-{name.lower().replace(' ', '-')}", words, ranks)
    with ranks_of(root, "engine.dtype=bf16", *words) as (plan, own):
        lines = [own.call("train_step", step)[0] for step in range(STEPS)]
        rates = [own_line["lr"] for own_line in lines]
    losses = [abs(a["train/loss"] - b["loss"]) for a, b in zip(found, lines, strict=True)]
    norms = [abs(a["train/grad_norm"] / b["grad_norm"] - 1) for a, b in zip(found, lines, strict=True)]
    print(name, f"losses {max(losses):.1e}", f"norms {max(norms):.1e}")
    assert max(losses) < band, losses
    assert max(norms) < 1e-2, norms
    # slime logs the rate after the scheduler has moved on.
    assert [a["train/lr-pg_0"] for a in found[:-1]] == pytest.approx(rates[1:], rel=1e-9)
