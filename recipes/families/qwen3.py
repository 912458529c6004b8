"""Qwen3, the hybrid and the 2507 releases: dense layers, QK norms, no biases."""

from recipes.config import Model
from recipes.families.common.facts import Chat, Config, Facts, Parsers, Tiny
from recipes.families.common.parts import Links, Tensors, attention, dense, ends, of_layer


def links(m: Model) -> Links:
    """Return every parameter by global Megatron name."""
    found = ends(m)
    for layer in range(m.layers):
        found |= attention(m, *of_layer(layer)) | dense(m, *of_layer(layer))
    return found


def mtp(m: Model) -> Tensors:
    """Return no tensors, because Qwen3 has no multi-token-prediction layers."""
    return {}


FACTS = Facts(
    # 2507 Instruct does not think, so its template has no empty thought.
    chat=Chat(roles=("<|im_start|>",), stops=("<|im_end|>",), empty_thought="<think>\n\n</think>\n\n"),
    config=Config("Qwen3Config", fixed={"qk_norm": True, "experts": 0, "mtp_layers": 0}),
    links=links,
    mtp=mtp,
    router=None,
    # A Qwen3 that does not think omits the marks, and the parser then takes its whole answer for thinking.
    parsers=Parsers("qwen25", "qwen3", always_reasons=False),
    tiny=Tiny(
        model="qwen3-tiny",
        special=(
            "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>",
            "</tool_response>",
        ),
        eos=("<|im_end|>", "<|endoftext|>"),
    ),
)  # fmt: skip
