"""slime's argument list: every value the recipe's, every flag known, and both accepted by the real slime and Megatron-LM."""

import json
import subprocess
import sys

import pytest

from launch.slime import arguments as module
from launch.slime.arguments import arguments
from recipes.compose import compose_recipe
from recipes.errors import ConfigError
from recipes.layout import data_parallel
from recipes.learning_rate import learning_rate
from tests.launch.slime.support import checked, planned, rendered

MODELS = ["glm4.5", "glm4.5-air", "qwen3-4b", "qwen3-8b", "qwen3-14b", "qwen3-32b"]
RELEASED = ["glm4.5", "glm4.5-air", "qwen3-4b", "qwen3-8b", "qwen3-32b"]
CASES = [*((m, ()) for m in MODELS), *((m, ("experiment=released", "cluster=h100x64")) for m in RELEASED)]


def values(argv):
    """{flag: its values}"""
    found = {}
    for word in argv:
        if word.startswith("--"):
            assert word not in found, f"{word} twice"
            found[word] = []
            last = word
        else:
            found[last].append(word)
    return found


@pytest.mark.parametrize(("model", "words"), CASES, ids=str)
def test_every_flag_is_given_once_and_known(model, words):
    found = values(rendered(f"model={model}", *words))
    recipe, steps = planned(f"model={model}", *words)
    assert set(found) <= module._FLAGS
    assert found["--num-rollout"] == [str(steps)]
    assert found["--global-batch-size"] == found["--rollout-batch-size"] == [str(data_parallel(recipe))]
    assert ("--custom-model-provider-path" in found) == (recipe.model.rope.value == "yarn")
    assert ("--no-rope-fusion" in found) == (recipe.model.rope.value == "yarn"), "the fused one has no attention factor"
    assert ("--num-experts" in found) == bool(recipe.model.experts)


def test_an_unknown_flag_fails_the_render(monkeypatch):
    monkeypatch.setattr(module, "_FLAGS", module._FLAGS - {"--swiglu"})
    with pytest.raises(AssertionError, match="--swiglu"):
        rendered("model=qwen3-4b")


def test_a_further_flag_is_passed_on_and_checked():
    recipe, steps = planned("model=qwen3-4b")

    def given(**args):
        recipe.engine.args = args
        try:
            return arguments(recipe, steps, "")
        finally:
            recipe.engine.args = {}

    assert given(tp_comm_overlap="true")[-1] == "--tp-comm-overlap"
    assert given(**{"manual-gc-interval": "5"})[-2:] == ["--manual-gc-interval", "5"]
    with pytest.raises(ConfigError, match="the nearest is --tp-comm-overlap"):
        given(tp_com_overlap="true")
    with pytest.raises(ConfigError, match="is the recipe's to say"):
        given(lr="1")
    with pytest.raises(ConfigError, match="is the recipe's to say"):
        given(lr_warmup_iters="5")


def test_pass_through_is_typed_on_the_command_line():
    recipe = compose_recipe(["model=qwen3-4b", "engine.args.manual_gc_interval=5"])
    assert recipe.engine.args == {"manual_gc_interval": "5"}


RATES = """
import json, sys
from types import SimpleNamespace
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

steps, batch, given = json.loads(sys.argv[1])
optimizer = SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.0, "lr_mult": 1.0, "wd_mult": 1.0}])
scheduler = OptimizerParamScheduler(
    optimizer, **given, lr_decay_style="cosine", start_wd=0.1, end_wd=0.1, wd_incr_steps=steps, wd_incr_style="constant"
)
rates = []
for _ in range(steps):
    rates.append(optimizer.param_groups[0]["lr"])
    scheduler.step(batch)
print(json.dumps(rates))
"""


@pytest.mark.parametrize("warmup", ["optim.warmup_steps=3", "optim.warmup_steps=0", "optim.warmup_fraction=0.9"])
@pytest.mark.parametrize("epochs", [1, 4])
def test_megatrons_rates_are_the_plans(warmup, epochs):
    """Megatron's own scheduler, made and stepped as slime does it: by the global batch, after each optimizer step."""
    recipe, steps = planned("model=qwen3-4b", "layout.cp=2", f"optim.epochs={epochs}", warmup)
    found = values(arguments(recipe, steps, ""))

    def number(flag, default=0.0):
        return float(found.get(flag, [default])[0])

    batch = data_parallel(recipe)
    decay = number("--lr-decay-iters") * batch
    by_fraction = "--lr-warmup-fraction" in found
    given = {
        "init_lr": number("--lr-warmup-init"),
        "max_lr": number("--lr"),
        "min_lr": number("--min-lr"),
        "lr_warmup_steps": number("--lr-warmup-fraction") * decay
        if by_fraction
        else number("--lr-warmup-iters") * batch,
        "lr_decay_steps": decay,
    }
    command = [sys.executable, "-W", "ignore", "-c", RATES, json.dumps([steps, batch, given])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == pytest.approx(
        [learning_rate(recipe.optim, s, steps) for s in range(steps)], rel=1e-9
    )


@pytest.mark.parametrize(("model", "words"), CASES, ids=str)
def test_slime_and_megatron_accept_the_list(reference, model, words):
    config = reference / "hf_configs" / model
    if not config.is_dir():
        pytest.skip(f"the reference folder has no config.json of {model}")
    found = checked(rendered(f"model={model}", *words), config)
    assert found["ok"], found
    assert found["unknown"] == []
