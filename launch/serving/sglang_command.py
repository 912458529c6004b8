"""SGLang's command line and environment for a checkpoint, by model family and device."""

import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import psutil

from data_prep.text.template_options import option_values
from launch.preflight.machine import gpus_here
from recipes.checkpoint.checkpoint_config import read_config, yarn_reach
from recipes.config import Recipe
from recipes.dimensions import parameters
from recipes.errors import PreflightError
from recipes.families import facts
from recipes.plan.serving import longest_context, servers

STAND_INS = Path(__file__).parent / "stand_ins"
_MAX_TOTAL_TOKENS = 65_536  # size of the key-value cache on a CPU, for all requests together
MEETING = "LIMI_SERVER_MEETING"  # variable: HOST:PORT, a space, and the number of nodes
_ELSEWHERE = (
    "run the command on a machine that has them and name it, e.g. cluster=h100x8; make sanity also accepts "
    "sanity.url=http://HOST:PORT of a running SGLang"
)


class Meeting(NamedTuple):
    """Where the processes of one server on several nodes meet. address: HOST:PORT on the first node. nodes: their number."""

    address: str
    nodes: int

    @staticmethod
    def here() -> "Meeting | None":
        """Return the meeting of this process, which `launch.cli.placed` sets in its environment; None for a server of one node."""
        address, _, nodes = os.environ.get(MEETING, "").partition(" ")
        return Meeting(address, int(nodes)) if address else None


def command(recipe: Recipe, checkpoint: Path, port: int, thinks: bool, rank: int = 0) -> list[str]:
    """Return SGLang's command line. It listens on loopback, uses no MTP speculation and runs no code of the checkpoint.

    thinks: whether the model was trained with thinking. rank: number of the node, for a server on several.

    Raise `PreflightError` if the recipe's cluster cannot serve the model.
    """
    parsers = facts(recipe.model.family).parsers
    parsed = ["--reasoning-parser", parsers.reasoning] if thinks or parsers.always_reasons else []
    meeting = Meeting.here()
    told = option_values(recipe.model.template_options)
    options = ["--default-chat-template-kwargs", json.dumps(told)] if told else []
    over = (
        ["--nnodes", str(meeting.nodes), "--node-rank", str(rank), "--dist-init-addr", meeting.address]
        if meeting
        else []
    )
    return [
        _python(recipe), "-m", "sglang.launch_server", "--model-path", str(checkpoint), "--host", "127.0.0.1",
        "--port", str(port), "--tool-call-parser", parsers.tool_calls, *parsed, *options, "--skip-server-warmup",
        "--log-level", "warning", *(_on_gpus(recipe, checkpoint) if on_gpus(recipe) else _on_cpu(recipe)), *over,
    ]  # fmt: skip


def check_machine(recipe: Recipe, checkpoint: Path) -> None:
    """Raise `PreflightError` if the model cannot be served on this machine, or on it as one of the nodes of a meeting."""
    m = recipe.model
    if on_gpus(recipe):
        wanted, there = servers(recipe, context(recipe, checkpoint)), gpus_here()
        meeting = Meeting.here()
        if wanted.nodes > (meeting.nodes if meeting else 1):
            raise PreflightError(
                f"SGLang needs {wanted.tp} x {recipe.gpu.name} on {wanted.nodes} nodes to serve {m.name}",
                "write cluster.address=http://HEAD:8265, and it runs there as a job over these nodes; or start it yourself, and write "
                "its sanity.url=http://HOST:PORT",
            )
        if there < (needed_here := wanted.tp // wanted.nodes):
            raise PreflightError(
                f"SGLang needs {needed_here} x {recipe.gpu.name} to serve {m.name}, but this machine has {there} GPUs",
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
    tp = servers(recipe, longest).tp
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
    longest = longest_context(recipe, own)
    reach = yarn_reach(config)
    if longest > own and reach is not None and reach < trained:
        raise PreflightError(
            f"data.max_tokens={trained} exceeds the {reach:,} tokens that the YaRN of '{checkpoint / 'config.json'}' reaches",
            f"write data.max_tokens={reach}",
        )
    return longest
