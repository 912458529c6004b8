"""SGLang's command line and environment for a checkpoint, by model family and device."""

import os
import sys
from pathlib import Path

import psutil

from launch.preflight.machine import gpus_here
from recipes.checkpoint.checkpoint_config import read_config, yarn_reach
from recipes.config import Model, Recipe, Rope
from recipes.dimensions import parameters
from recipes.errors import PreflightError
from recipes.families import facts

STAND_INS = Path(__file__).parent / "stand_ins"
_MAX_TOTAL_TOKENS = 65_536  # size of the key-value cache on a CPU, for all requests together
RESERVED = 7  # SGLang's longest prompt is this many tokens shorter than its context
_ELSEWHERE = (
    "run the command on a machine that has them and name it, e.g. cluster=h100x8; make sanity also accepts "
    "sanity.url=http://HOST:PORT of a running SGLang"
)
_SHARE = (
    0.75  # share of GPU memory for weights and one longest sequence; the rest is for SGLang itself and more sequences
)


def command(recipe: Recipe, checkpoint: Path, port: int, thinks: bool) -> list[str]:
    """Return SGLang's command line. It listens on loopback, uses no MTP speculation and runs no code of the checkpoint.

    thinks: whether the model was trained with thinking.

    Raise `PreflightError` if one node of the recipe's cluster cannot serve the model.
    """
    parsers = facts(recipe.model.family).parsers
    parsed = ["--reasoning-parser", parsers.reasoning] if thinks or parsers.always_reasons else []
    return [
        _python(recipe), "-m", "sglang.launch_server", "--model-path", str(checkpoint), "--host", "127.0.0.1",
        "--port", str(port), "--tool-call-parser", parsers.tool_calls, *parsed, "--skip-server-warmup",
        "--log-level", "warning", *(_on_gpus(recipe, checkpoint) if on_gpus(recipe) else _on_cpu(recipe)),
    ]  # fmt: skip


def check_machine(recipe: Recipe, checkpoint: Path) -> None:
    """Raise `PreflightError` if the model cannot be served on this machine or on one node of the recipe's cluster."""
    m = recipe.model
    if on_gpus(recipe):
        wanted, there = tensor_parallel(recipe, context(recipe, checkpoint)), gpus_here()
        if there < wanted:
            raise PreflightError(
                f"SGLang needs {wanted} x {recipe.gpu.name} to serve {m.name}, but this machine has {there} GPUs",
                _ELSEWHERE,
            )
        return
    needed = 4 * (parameters(m).total + _MAX_TOTAL_TOKENS * 2 * m.layers * m.kv_heads * m.head_dim)
    if needed > (memory := psutil.virtual_memory().total):
        raise PreflightError(
            f"SGLang needs {needed / 1e9:,.0f} GB to serve {m.name} on a CPU (fp32 weights and a cache of {_MAX_TOTAL_TOKENS:,} "
            f"tokens), but this machine has {memory / 1e9:,.0f} GB",
            _ELSEWHERE,
        )


def environment(recipe: Recipe, checkpoint: Path) -> dict[str, str]:
    """Return the environment of the server's process."""
    shared = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    if not on_gpus(recipe):
        shared |= {
            "SGLANG_USE_CPU_ENGINE": "1", "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(STAND_INS),
        }  # fmt: skip
    elif context(recipe, checkpoint) > read_config(checkpoint)["max_position_embeddings"]:
        shared["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
    return shared


def on_gpus(recipe: Recipe) -> bool:
    return recipe.gpu.memory_mib is not None


def _python(recipe: Recipe) -> str:
    return (recipe.engine.python or sys.executable) if on_gpus(recipe) else sys.executable


def _on_cpu(recipe: Recipe) -> list[str]:
    """Return the flags for a CPU. The dtype is always fp32: most CPUs only emulate bf16."""
    if recipe.sanity.tp not in (None, 1):
        raise PreflightError(
            f"sanity.tp={recipe.sanity.tp} needs GPUs, but gpu={recipe.gpu.name}", "write sanity.tp=null"
        )
    return [
        "--device", "cpu", "--dtype", "float32", "--max-total-tokens", str(_MAX_TOTAL_TOKENS), "--max-running-requests", "16",
    ]  # fmt: skip


def _on_gpus(recipe: Recipe, checkpoint: Path) -> list[str]:
    longest = context(recipe, checkpoint)
    tp = tensor_parallel(recipe, longest)
    words = ["--dtype", "bfloat16", "--tp-size", str(tp), "--context-length", str(longest)]
    # Each GPU holds whole experts if their number is divisible by tp.
    return words + (
        ["--ep-size", str(tp)] if tp > 1 and recipe.model.experts and recipe.model.experts % tp == 0 else []
    )


def context(recipe: Recipe, checkpoint: Path) -> int:
    """Return the context length in tokens, prompt and answer together.

    It is the config's, or the training length if that is longer. Raise `PreflightError` if the checkpoint's YaRN does not
    reach the training length.
    """
    config, trained = read_config(checkpoint), recipe.data.max_tokens
    own: int = config["max_position_embeddings"]
    if recipe.model.rope is Rope.native or trained + RESERVED <= own:
        return own
    reach = yarn_reach(config)
    if reach is not None and reach < trained:
        raise PreflightError(
            f"data.max_tokens={trained} exceeds the {reach:,} tokens that the YaRN of '{checkpoint / 'config.json'}' reaches",
            f"write data.max_tokens={reach}",
        )
    return trained + RESERVED


def tensor_parallel(recipe: Recipe, longest: int) -> int:
    """Return `sanity.tp`, or the smallest power of two of one node's GPUs that holds the bf16 weights and one longest sequence.

    Raise `PreflightError` if `sanity.tp` does not suit the model's heads or the node's GPUs, or if no degree has enough memory.
    """
    r, m = recipe, recipe.model
    able = [tp for tp in (2**n for n in range(r.cluster.gpus_per_node.bit_length())) if _divides(m, tp)]
    if r.sanity.tp is not None:
        if r.sanity.tp > r.cluster.gpus_per_node or not _divides(m, r.sanity.tp):
            raise PreflightError(
                f"sanity.tp={r.sanity.tp} is not possible with {m.heads} attention heads, {m.kv_heads} key-value heads and "
                f"{r.cluster.gpus_per_node} GPUs per node",
                f"write sanity.tp={able[-1]}, or sanity.tp=null",
            )
        return r.sanity.tp
    assert r.gpu.memory_mib is not None
    # bf16 weights; 4 bytes = one key and one value in bf16, for every token, layer and key-value head dimension
    needed = 2 * parameters(m).total + longest * 4 * m.layers * m.kv_heads * m.head_dim
    one = r.gpu.memory_mib * 2**20
    for tp in able:
        if needed <= _SHARE * tp * one:
            return tp
    raise PreflightError(
        f"serving {m.name} needs {needed / 1e9:,.0f} GB for weights and one sequence of {longest:,} tokens, but a node of "
        f"{able[-1]} x {r.gpu.name} offers {_SHARE * able[-1] * one / 1e9:,.0f} GB",
        "start SGLang over several nodes and write its sanity.url=http://HOST:PORT, or name a larger node, cluster=h200x8",
    )


def _divides(m: Model, tp: int) -> bool:
    """Return whether SGLang can split the heads over `tp` ranks. It splits all heads evenly, or repeats the key-value heads."""
    return m.heads % tp == 0 and (m.kv_heads % tp == 0 or tp % m.kv_heads == 0)
