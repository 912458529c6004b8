"""slime's argument list for a recipe. One function yields each group of flags, and every value comes from the recipe.

The flags are those of slime 624b824 and Megatron-LM 1dcf0da; `flags.txt` lists all names. slime silently ignores unknown flags, so
this module refuses them.
"""

import math
from collections.abc import Iterator
from pathlib import Path

from recipes.compose.kinds import advice
from recipes.compose.names.instead import as_here
from recipes.compose.names.nearest import nearest
from recipes.config import OptimizerState, Recipe, Recompute, Rope
from recipes.errors import ConfigError
from recipes.families import facts
from recipes.families.common.facts import Router
from recipes.layout import data_parallel
from recipes.paths import run_folder
from recipes.plan.saves import save_interval

_FLAGS = frozenset((Path(__file__).parent / "flags.txt").read_text(encoding="utf-8").split())
Argument = str | int | float
Group = Iterator[tuple[Argument, ...]]


def arguments(r: Recipe, num_steps: int, load: str, *, save: bool = True) -> list[str]:
    """Return the arguments of `train_async.py`.

    num_steps: optimizer steps of the run. load: a Hugging Face folder, or the checkpoints folder of a run. save: whether to write
    checkpoints. Raise `ConfigError` if `engine.args` names a flag that slime does not know, or one that the recipe sets.
    """
    groups = (
        model(r), data(r, num_steps), layout(r), memory(r), optimizer(r, num_steps), loss(),
        checkpoint(r, num_steps, load, save), logging(r), device(r),
    )  # fmt: skip
    rendered = [words for group in groups for words in group]
    given = [str(words[0]) for words in rendered]
    unknown = sorted(set(given) - _FLAGS)
    if unknown:
        raise AssertionError(f"slime does not know the flags {unknown}")
    for name, value in r.engine.args.items():
        rendered.append(_passed_on(name, value, given))
    return [_text(word) for words in rendered for word in words]


def _passed_on(name: str, value: str, given: list[str]) -> tuple[Argument, ...]:
    flag = "--" + name.replace("_", "-")
    if flag not in _FLAGS:
        near = nearest(flag, _FLAGS)
        fix = f"the nearest is {near}: {advice(f'engine.args.{near[2:]}={value}')}" if near else as_here(name, value)
        raise ConfigError(
            f"engine.args.{name}: slime has no {flag}", fix or "leave it out; launch/slime/flags.txt lists all flags"
        )
    if flag in given:
        raise ConfigError(
            f"engine.args.{name}={value}: the recipe sets {flag}",
            as_here(name, value) or "change it in the recipe, as `make help` shows",
        )
    return (flag,) if value == "true" else (flag, *value.split())


def _text(word: Argument) -> str:
    return repr(word) if isinstance(word, float) else str(word)


def model(r: Recipe) -> Group:
    """Yield the flags of the architecture. MTP layers are neither loaded nor trained; the export copies them from the base."""
    m = r.model
    yield "--num-layers", m.layers
    yield "--hidden-size", m.hidden
    yield "--ffn-hidden-size", m.ffn
    yield "--num-attention-heads", m.heads
    yield ("--group-query-attention",)
    yield "--num-query-groups", m.kv_heads
    yield "--kv-channels", m.head_dim
    yield "--vocab-size", m.vocab
    yield "--normalization", "RMSNorm"
    yield "--norm-epsilon", m.norm_eps
    yield ("--swiglu",)
    yield ("--disable-bias-linear",)
    yield "--position-embedding-type", "rope"
    yield "--rotary-base", int(m.rope_base)
    yield "--rotary-percent", m.rope_fraction
    yield "--attention-dropout", 0.0
    yield "--hidden-dropout", 0.0
    if m.qk_norm:
        yield ("--qk-layernorm",)
    if m.qkv_bias:
        yield ("--add-qkv-bias",)
    if not m.tied:
        yield ("--untie-embeddings-and-output-weights",)
    if m.rope is Rope.yarn:
        yield "--custom-model-provider-path", "launch.slime.hooks.yarn.provider"
    if m.rope is Rope.yarn or on_cpu(r):
        yield ("--no-rope-fusion",)  # for packed sequences, the fused kernel omits YaRN's attention factor
    if m.experts and (router := facts(m.family).router):
        yield from _experts(r, router)


def _experts(r: Recipe, router: Router) -> Group:
    m = r.model
    yield "--num-experts", m.experts
    yield "--moe-layer-freq", f"[0]*{m.dense_layers}+[1]*{m.layers - m.dense_layers}"
    yield "--moe-ffn-hidden-size", m.expert_ffn
    if m.shared_experts:
        yield "--moe-shared-expert-intermediate-size", m.shared_experts * m.expert_ffn
    yield "--moe-router-topk", m.top_k
    yield "--moe-router-topk-scaling-factor", m.router_scaling
    if router.pre_softmax:
        yield ("--moe-router-pre-softmax",)
    yield "--moe-router-score-function", router.score_function
    if router.expert_bias:
        yield ("--moe-router-enable-expert-bias",)
        yield "--moe-router-bias-update-rate", 0.0  # fine-tuning keeps the released model's routing balance
    yield "--moe-router-load-balancing-type", "none"
    yield "--moe-aux-loss-coeff", 0.0
    yield "--moe-router-dtype", "fp32"
    yield "--moe-token-dispatcher-type", "alltoall"
    yield ("--moe-grouped-gemm",)
    if not on_cpu(r):
        yield ("--moe-permute-fusion",)


def data(r: Recipe, num_steps: int) -> Group:
    """Yield the flags of the data. `rollout.py` provides the steps. Each step has as many rollout ids as data-parallel ranks, however
    many sequences it has, so slime counts it as one optimizer step."""
    yield "--rollout-function-path", "launch.slime.hooks.rollout.generate"
    yield "--rollout-data-postprocess-path", "launch.slime.hooks.rollout.verify"
    yield "--custom-megatron-before-train-step-hook-path", "launch.slime.hooks.steps.before"
    yield ("--disable-rollout-global-dataset",)
    yield "--num-rollout", num_steps
    yield "--rollout-batch-size", data_parallel(r)
    yield "--global-batch-size", data_parallel(r)
    yield "--seed", r.seed


def layout(r: Recipe) -> Group:
    """Yield the flags of the parallel layout."""
    p = r.layout
    yield "--actor-num-nodes", r.cluster.nodes
    yield "--actor-num-gpus-per-node", r.cluster.gpus_per_node
    yield "--num-gpus-per-node", r.cluster.gpus_per_node
    yield "--tensor-model-parallel-size", p.tp
    if p.sp:
        yield ("--sequence-parallel",)
    yield "--pipeline-model-parallel-size", p.pp
    if p.vpp > 1:
        yield "--num-virtual-stages-per-pipeline-rank", p.vpp
    if p.first_stage_layers is not None:
        yield "--decoder-first-pipeline-num-layers", p.first_stage_layers
    if p.last_stage_layers is not None:
        yield "--decoder-last-pipeline-num-layers", p.last_stage_layers
    yield "--context-parallel-size", p.cp
    if r.model.experts:
        yield "--expert-model-parallel-size", p.ep
        yield "--expert-tensor-parallel-size", p.etp
    yield "--attention-backend", "unfused" if on_cpu(r) else "flash"
    yield ("--attention-softmax-in-fp32",)
    yield "--distributed-timeout-minutes", math.ceil(r.engine.timeout / 60)


def memory(r: Recipe) -> Group:
    """Yield the flags of micro-batch size, recomputation, loss chunks and optimizer state."""
    p = r.layout
    yield ("--use-dynamic-batch-size",)
    yield "--max-tokens-per-gpu", p.max_tokens_per_gpu
    if p.recompute is Recompute.full:
        yield "--recompute-granularity", "full"
        yield "--recompute-method", "uniform"
        yield "--recompute-num-layers", 1
    elif p.recompute is Recompute.selective:
        yield "--recompute-granularity", "selective"
        yield ("--recompute-modules", *(("mlp", "moe") if r.model.experts else ("mlp",)))
    if p.loss_chunk is not None:
        # Chunks alone save no memory: without recomputation, every chunk's softmax is saved for the backward pass.
        yield ("--recompute-loss-function",)
        yield "--log-probs-chunk-size", p.loss_chunk
    if p.optimizer_state is not OptimizerState.resident:
        yield ("--use-precision-aware-optimizer",)
    if p.optimizer_state is OptimizerState.offloaded:
        yield ("--optimizer-cpu-offload",)
        yield ("--overlap-cpu-optimizer-d2h-h2d",)


def optimizer(r: Recipe, num_steps: int) -> Group:
    """Yield the flags of Adam and its schedule. In every step the rate equals `recipes.schedule.learning_rate`'s; Megatron counts the
    steps before the current one."""
    o = r.optim
    yield "--optimizer", "adam"
    yield "--lr", o.lr
    yield "--min-lr", o.lr * o.min_lr_ratio
    yield "--lr-decay-style", "cosine"
    if o.warmup_fraction is not None:
        yield "--lr-warmup-fraction", o.warmup_fraction
        yield "--lr-decay-iters", num_steps
    else:
        yield "--lr-warmup-iters", o.warmup_steps
        yield "--lr-warmup-init", o.lr / (o.warmup_steps + 1)
        yield "--lr-decay-iters", max(num_steps - 1, o.warmup_steps + 1)
    yield ("--override-opt-param-scheduler",)  # a checkpoint's scheduler counts in units of its own data parallelism
    yield "--weight-decay", o.weight_decay
    yield "--adam-beta1", o.beta1
    yield "--adam-beta2", o.beta2
    yield "--adam-eps", o.eps
    yield "--clip-grad", o.clip_grad
    yield ("--accumulate-allreduce-grads-in-fp32",)


def loss() -> Group:
    """Yield the flags of the loss: the sum over the supervised tokens of a step, divided by their number."""
    yield "--loss-type", "sft_loss"
    yield ("--calculate-per-token-loss",)
    yield ("--disable-compute-advantages-and-returns",)
    yield ("--debug-train-only",)


def checkpoint(r: Recipe, num_steps: int, load: str, save: bool) -> Group:
    """Yield the flags of loading and saving checkpoints. load, save: see `arguments`."""
    yield "--hf-checkpoint", r.model.checkpoint
    yield "--load", load
    if save:
        yield "--save", str(run_folder(r) / "checkpoints")
        yield "--save-interval", save_interval(r, num_steps)


def logging(r: Recipe) -> Group:
    """Yield the flags of TensorBoard and W&B. TensorBoard's folder is TENSORBOARD_DIR in `job.json`. W&B's key must be in the
    environment in which Ray was started."""
    yield ("--use-tensorboard",)
    yield "--tb-project-name", "limi"
    yield "--tb-experiment-name", r.run
    if r.engine.wandb is not None:
        yield ("--use-wandb",)
        yield "--wandb-project", r.engine.wandb
        yield "--wandb-group", r.run
        yield ("--disable-wandb-random-suffix",)
        yield "--wandb-dir", str(run_folder(r) / "wandb")


def on_cpu(r: Recipe) -> bool:
    """Return whether the ranks are CPU cores of this machine. Such runs test the contract with slime."""
    return r.gpu.name == "cpu"


def device(r: Recipe) -> Group:
    """Yield the flags for a CPU: the project's own layers, and no kernels of Transformer Engine or Apex."""
    if not on_cpu(r):
        return
    yield "--distributed-backend", "gloo"
    yield "--transformer-impl", "local"
    yield "--spec", "launch.slime.hooks.cpu", "layers"
    yield "--cp-comm-type", "all_gather"
    yield ("--use-cpu-initialization",)
    yield ("--no-persist-layer-norm",)
    for kernel in ("gradient-accumulation", "masked-softmax", "bias-swiglu", "bias-dropout"):
        yield (f"--no-{kernel}-fusion",)
