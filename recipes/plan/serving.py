"""GPUs that SGLang takes for a model: how many share it, and over how many nodes."""

from typing import NamedTuple

from recipes.config import Model, Recipe, Rope
from recipes.dimensions import parameters
from recipes.errors import PreflightError

RESERVED = 7  # SGLang's longest prompt is this many tokens shorter than its context
_SHARE = 0.75  # of GPU memory for weights and one longest sequence; the rest is for SGLang itself and more sequences


class Servers(NamedTuple):
    """tp: GPUs that share the model. nodes: nodes over which they are spread, all GPUs of each if there are several."""

    tp: int
    nodes: int


def longest_context(r: Recipe, own: int) -> int:
    """Return the context length in tokens, prompt and answer together. own: max_position_embeddings of the checkpoint."""
    trained = r.data.max_tokens + RESERVED
    return own if r.model.rope is Rope.native or trained <= own else trained


def servers(r: Recipe, longest: int) -> Servers:
    """Return `sanity.tp`, or the smallest power of two of a node's GPUs, then of whole nodes, that holds the bf16 weights and one
    longest sequence.

    Raise `PreflightError` if `sanity.tp` does not suit the model's heads or the cluster's GPUs, or if the memory is too small.
    """
    m, a_node = r.model, r.cluster.gpus_per_node
    able = [tp for tp in _degrees(a_node, r.cluster.nodes) if _divides(m, tp)]
    if r.sanity.tp is not None:
        if r.sanity.tp not in able:
            raise PreflightError(
                f"sanity.tp={r.sanity.tp} is not possible with {m.heads} attention heads, {m.kv_heads} key-value heads and "
                f"{r.cluster.nodes} x {a_node} GPUs",
                f"write sanity.tp={able[-1]}, or sanity.tp=null",
            )
        return Servers(r.sanity.tp, -(-r.sanity.tp // a_node))
    assert r.gpu.memory_mib is not None
    # bf16 weights; 4 bytes = one key and one value in bf16, for every token, layer and key-value head dimension
    needed = 2 * parameters(m).total + longest * 4 * m.layers * m.kv_heads * m.head_dim
    one = r.gpu.memory_mib * 2**20
    for tp in able:
        if needed <= _SHARE * tp * one:
            return Servers(tp, -(-tp // a_node))
    raise PreflightError(
        f"serving {m.name} needs {needed / 1e9:,.0f} GB for weights and one sequence of {longest:,} tokens, but {able[-1]} x "
        f"{r.gpu.name} offer {_SHARE * able[-1] * one / 1e9:,.0f} GB",
        "start SGLang over more nodes and write its sanity.url=http://HOST:PORT, or name larger nodes, cluster=h200x8",
    )


def described(r: Recipe, found: Servers) -> str:
    return f"SGLang on {found.tp} x {r.gpu.name}{f' of {found.nodes} nodes' if found.nodes > 1 else ''}"


def foreseen(r: Recipe) -> str:
    """Return what will serve the trained model for the check at the end, or why nothing can."""
    if r.gpu.memory_mib is None:
        return "SGLang on this machine's cores"
    try:
        return described(r, servers(r, longest_context(r, r.model.max_position)))
    except PreflightError as error:
        return f"no server, so that only the files are checked: {error}"


def _degrees(a_node: int, nodes: int) -> list[int]:
    """Return powers of two up to a node's GPUs, then whole nodes in powers of two."""
    inside = [2**n for n in range(a_node.bit_length())]
    return inside + [a_node * 2**n for n in range(1, nodes.bit_length()) if a_node * 2**n not in inside]


def _divides(m: Model, tp: int) -> bool:
    """Return whether SGLang can split the heads over `tp` ranks. It splits all heads evenly, or repeats the key-value heads."""
    return m.heads % tp == 0 and (m.kv_heads % tp == 0 or tp % m.kv_heads == 0)
