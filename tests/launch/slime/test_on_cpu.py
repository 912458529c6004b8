"""The real, unmodified slime on CPU ranks: it trains the planned steps as the embedded engine does, and goes on after a kill."""

import io
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from rich.console import Console
from torch.distributed.checkpoint import FileSystemReader

from launch.cluster.image.pins import VERSIONS
from launch.run import metrics
from launch.run.run_folder import RunFolder
from launch.run.run_plan import Plan
from launch.slime import engine
from launch.weights.safetensors_folder import SafetensorsFolder
from tests.launch.slime.support import on_cpu, slime_at
from tests.launch.support import POOL, ranks_of, recipe_of

pytestmark = pytest.mark.contract

QWEN, GLM = ["model=qwen3-tiny"], ["model=glm4.5-tiny", "layout=data_parallel"]
SP, EP, ALL = "layout.tp=2 layout.sp=true", "layout.ep=2", "layout.tp=2 layout.sp=true layout.pp=2 layout.cp=2"
# Model, ranks, layout. GLM's band is wider after the first step: rounding sends a token to another expert now and then.
LAYOUTS = {
    "Qwen3 one rank": (QWEN, 1, ""),
    "Qwen3 YaRN": (QWEN, 1, "model.rope=yarn model.native_context=512 model.rope_factor=4"),
    "Qwen3 DP2": (QWEN, 2, ""),
    "Qwen3 TP2": (QWEN, 2, "layout.tp=2"),
    "Qwen3 TP2 SP": (QWEN, 2, SP),
    "Qwen3 PP2": (QWEN, 2, "layout.pp=2"),
    "Qwen3 CP2": (QWEN, 2, "layout.cp=2"),
    "Qwen3 TP2 PP2 CP2": (QWEN, 8, ALL),
    "GLM one rank": (GLM, 1, ""),
    "GLM DP2": (GLM, 2, ""),
    "GLM TP2 SP EP2": (GLM, 2, f"{SP} {EP}"),
    "GLM PP2": (GLM, 2, "layout.pp=2"),
    "GLM CP2": (GLM, 2, "layout.cp=2"),
    "GLM EP2": (GLM, 2, EP),
    "GLM TP2 PP2 CP2 EP2": (GLM, 8, f"{ALL} {EP}"),
}
SHORT = ["model.layers=4", "optim.epochs=1", "optim.eval_steps=5", "engine.save_steps=3", "engine.max_retries=0"]


def words(root: Path, model: list[str], ranks: int, layout: str) -> list[str]:
    # One base for all layouts of a model.
    base = f"model.checkpoint={root}/models/slime-{model[0].partition('=')[2]}"
    return [*model, *SHORT, f"cluster.gpus_per_node={ranks}", base, *layout.split()]


def trained(root: Path, name: str, *given: str) -> tuple[Plan, Path]:
    """A run through slime to its end; its plan and its last checkpoint."""
    on_cpu()
    recipe, data, heldout = recipe_of(root, "engine=slime", f"run=slime-{name.lower().replace(' ', '-')}", *given)
    said = io.StringIO()
    plan = Plan(recipe, data, heldout)
    return plan, engine.train_through_slime(plan, RunFolder(recipe, data, heldout), Console(file=said, soft_wrap=True))


def lines(plan: Plan) -> tuple[list[dict], list[dict]]:
    """Of steps, and of held-out losses."""
    found = metrics.read_metrics(Path(plan.recipe.cluster.root) / "runs" / plan.recipe.run / metrics.NAME)
    return [m for m in found if "loss" in m], [m for m in found if "heldout_loss" in m]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_slime_trains_the_planned_steps_as_the_embedded_engine_does(root, name):
    model, ranks, layout = LAYOUTS[name]
    given = words(root, model, ranks, layout)
    plan, checkpoint = trained(root, name, *given)
    found, heldout = lines(plan)
    with ranks_of(root, "engine.dtype=bf16", *given) as (_, own):
        before = own.call("heldout_loss")[0]
        wanted = [own.call("train_step", step)[0] for step in range(plan.schedule.num_steps)]
        after = own.call("heldout_loss")[0]
    POOL.close()
    saved = sorted(p.name for p in checkpoint.parent.glob("iter_*"))
    assert saved == ["iter_0000002", "iter_0000004"], "every engine.save_steps=3, and the last"
    if model is GLM:
        assert torch.equal(trained_bias(checkpoint), base_bias(plan)), "frozen, fp32, bit for bit"
    band = 1e-3 if model is QWEN else 1e-2
    losses = [abs(a["loss"] - b["loss"]) for a, b in zip(found, wanted, strict=True)]
    norms = [abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in zip(found, wanted, strict=True)]
    unseen = [abs(a["heldout_loss"] - b) for a, b in zip(heldout, (before, after), strict=True)]
    print(f"| {name} | {ranks} | {max(losses):.1e} | {max(norms):.1e} | {max(unseen):.1e} |")
    assert losses[0] < (1e-3 if model is QWEN else 2e-3), losses
    assert max(losses) < band, losses
    assert max(norms) < 1e-2, norms
    assert max(unseen) < band, unseen
    for key in ("step", "lr", "tokens", "supervised_tokens"):
        assert [a[key] for a in found] == [b[key] for b in wanted]
    if name.endswith("one rank"):
        assert abs(found[0]["loss"] - by_transformers(plan)) < (1e-3 if model is QWEN else 2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Qwen3 CP2", "GLM EP2"])
def test_slime_of_each_image_trains_bit_for_bit_as_the_pinned_one(root, tmp_path, name):
    model, ranks, layout = LAYOUTS[name]
    given = words(root, model, ranks, layout)
    pinned, *others = (
        trained(
            root,
            f"{version.commits[0][:7]} {name}",
            f"engine.slime_root={slime_at(version.commits[0], tmp_path / version.commits[0])}",
            *given,
        )[0]
        for version in VERSIONS
    )
    for other in others:
        for ours, theirs in zip(lines(other), lines(pinned), strict=True):
            assert [{**line, "time": 0} for line in ours] == [{**line, "time": 0} for line in theirs]


def trained_bias(checkpoint: Path) -> torch.Tensor:
    """[layers x experts] of a torch_dist checkpoint."""
    there = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    found = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in there.items()
        if name.endswith("router.expert_bias")
    }
    dcp.load(found, checkpoint_id=checkpoint, no_dist=True)
    return torch.cat([found[name].flatten() for name in sorted(found)])


def base_bias(plan: Plan) -> torch.Tensor:
    m, base = plan.recipe.model, SafetensorsFolder(Path(plan.recipe.model.checkpoint))
    layers = range(m.dense_layers, m.layers)
    found = torch.cat([base.read(f"model.layers.{i}.mlp.gate.e_score_correction_bias") for i in layers])
    assert not torch.equal(found, found.bfloat16().float()), "a bias that bf16 holds would show nothing"
    return found


def by_transformers(plan: Plan) -> float:
    """The first step's loss by transformers in bf16, sequence by sequence."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(plan.recipe.model.checkpoint, dtype=torch.bfloat16)
    total = count = 0
    with torch.no_grad():
        for sequence in plan.schedule.step(0).sequences:
            tokens = torch.tensor(plan.data.tokens(sequence), dtype=torch.long)
            losses = F.cross_entropy(model(tokens[None]).logits[0, :-1].float(), tokens[1:], reduction="none")
            for start, end in plan.data.spans(sequence):
                total += float(losses[start - 1 : end - 1].sum())
                count += end - start
    return total / count
