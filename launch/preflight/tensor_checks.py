"""Comparison of a checkpoint's tensors with those of the recipe's model: names, shapes and dtypes.

Only the headers of its files are read, no values.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping

from launch.weights.safetensors_file import Entry
from launch.weights.shards import WIDTHS, some
from recipes.checkpoint.tensors import is_mtp, mtp, trained
from recipes.config import Model, Mtp
from recipes.errors import Fault
from recipes.families.common.parts import EMBEDDING, OUTPUT, Tensors

Entries = Mapping[str, Entry]

SHOWN = 4  # most kinds of names in a sentence
_FUSED = re.compile(r"\.mlp\.experts\.(gate_up_proj|down_proj)$")
_ADAPTER = re.compile(r"(^|\.)lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\.|$)|^base_model\.model\.")
# Tensors that FP8, GPTQ, AWQ, compressed-tensors, bitsandbytes and others store next to, or instead of, a weight.
_QUANTISED = re.compile(
    r"\.(weight_scale_inv|weight_scale(_2)?|input_scale|weight_packed|weight_shape|weight_zero_point|weight_g_idx|qweight|qzeros|"
    r"scales|g_idx|SCB|weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)|weight_blocks|weight_scales)$"
)
_OF_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.")
_OF_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXPERT_PARTS = 3  # gate, up and down
# Tensors that an MTP layer may lack: servers use the model's own.
_SHARED = (".embed_tokens.weight", ".shared_head.head.weight")
_BIAS = ".e_score_correction_bias"


def faults(m: Model, there: Entries) -> Iterator[Fault]:
    """Yield everything that would stop training or make it train another model."""
    if (other := _of_another_kind(m, there)) is not None:
        yield other
        return
    prefix = _prefix(there)
    if prefix is not None:
        lacks = "" if prefix else ", as if the model was saved without its output layer"
        yield Fault(
            f"names begin with '{prefix}', but the model's begin with 'model.': {prefix}embed_tokens.weight{lacks}",
            f"rename them with safetensors, file by file and in the index, or write model.checkpoint=FOLDER of a {m.name} with "
            "transformers' names",
        )
        there = _renamed(there, prefix)
    expected = wanted(m)
    yield from _missing(m, expected, there)
    yield from _extra(m, expected, there)
    yield from _shapes(m, expected, there)
    untrainable = [n for n in expected if n in there and there[n].dtype not in WIDTHS]
    if untrainable:
        dtypes = ", ".join(sorted({there[n].dtype for n in untrainable}))
        yield Fault(f"{some(untrainable)} {dtypes}; only {', '.join(WIDTHS)} can be trained", _not_quantised(m))


def oddities(m: Model, there: Entries) -> Iterator[Fault]:
    """Yield what is right in some checkpoints and a mistake in others."""
    if m.tied and OUTPUT in there:
        yield Fault(
            f"{OUTPUT} is present, but the recipe's model is tied: training, Megatron, slime and SGLang use {EMBEDDING} for both and "
            f"ignore it; transformers uses it if the two differ",
            "nothing is to be done if they are equal; if they differ, set tie_word_embeddings to false in config.json and write "
            "model.tied=false",
        )
    biases = [n for n in there if n.endswith(_BIAS) and there[n].dtype != "F32"]
    if biases:
        yield Fault(
            f"{some(biases)} {there[biases[0]].dtype}, but released in F32: tokens with close scores go to other experts",
            f"write model.checkpoint=FOLDER of a {m.name} whose bias was not rounded",
        )
    counts = Counter(e.dtype for n, e in there.items() if not n.endswith(_BIAS))
    if len(counts) > 1:
        rarest = min(counts, key=lambda dtype: counts[dtype])
        first = next(n for n, e in there.items() if e.dtype == rarest and not n.endswith(_BIAS))
        text = ", ".join(f"{count:,} {dtype}" for dtype, count in counts.most_common())
        yield Fault(
            f"tensors of several dtypes: {text}, e.g. {first}; the export preserves each tensor's dtype",
            "nothing is to be done if that is intended",
        )


def wanted(m: Model) -> Tensors:
    """Return the shapes of the expected tensors: all that are trained, and the MTP layers that the export copies."""
    return trained(m) | (mtp(m) if m.mtp is Mtp.copy else {})


def again(m: Model) -> str:
    """Return the fix for an incomplete checkpoint."""
    return f"download {m.checkpoint} again, or write model.checkpoint=FOLDER of a whole {m.name}"


def _not_quantised(m: Model) -> str:
    return f"write model.checkpoint=FOLDER of the {m.name} in {' or '.join(WIDTHS)}, from which it was quantised"


def _of_another_kind(m: Model, there: Entries) -> Fault | None:
    """Return the fault of a checkpoint whose tensor names show another format (adapter, quantised, fused experts), or None.

    Such a checkpoint needs no further checks: their faults would only follow from this one.
    """
    if adapter := [n for n in there if _ADAPTER.search(n)]:
        return Fault(
            f"{some(adapter)} of a LoRA adapter, not of a model",
            "merge it into its base (peft: merge_and_unload, save_pretrained), and write model.checkpoint=FOLDER of the result",
        )
    if quantised := [n for n in there if _QUANTISED.search(n)]:
        return Fault(f"{some(quantised)} of quantised weights, which cannot be trained", _not_quantised(m))
    if fused := [n for n in there if _FUSED.search(n)]:
        return Fault(
            f"{some(fused)} of all experts in one, but {m.name} is released with one tensor per expert",
            f"split them with safetensors (gate_up_proj[e] holds the gate above the up projection), or write "
            f"model.checkpoint=FOLDER of a {m.name} as released",
        )
    return None


def _prefix(there: Entries) -> str | None:
    """Return the prefix that the names have instead of `model.`, or None if they have the right one or no embedding is found."""
    end = EMBEDDING.removeprefix("model.")
    embeddings = [n for n in there if (n == end or n.endswith(f".{end}")) and not re.search(r"(^|\.)layers\.\d", n)]
    if not embeddings or EMBEDDING in embeddings:
        return None
    return min(embeddings, key=len).removesuffix(end)


def _renamed(there: Entries, prefix: str) -> Entries:
    """Return the tensors under the names of the recipe's model."""
    around = prefix.removesuffix("model.")  # prefix of the whole model, including its output layer
    heads = {f"{around}{OUTPUT}", f"{prefix}{OUTPUT}"}
    return {
        OUTPUT if n in heads else f"model.{n.removeprefix(prefix)}" if n.startswith(prefix) else n: e
        for n, e in there.items()
    }


def _missing(m: Model, expected: Tensors, there: Entries) -> Iterator[Fault]:
    missing = [n for n in expected if n not in there]
    if OUTPUT in missing:
        yield Fault(
            f"{OUTPUT} is missing, but the recipe's model is untied (model.tied=false): slime would silently start from a copy of "
            "the embedding",
            f"{again(m)}; if it was trained tied, set tie_word_embeddings to true in config.json and write model.tied=true",
        )
    layers = [n for n in missing if is_mtp(n, m) and not n.endswith(_SHARED)]
    if layers:
        of = sum(is_mtp(n, m) for n in expected)
        yield Fault(
            f"{len(layers):,} of the {of:,} tensors of multi-token-prediction layers, which the export copies, are missing: "
            f"{_kinds(layers)}",
            "write model.mtp=drop",
        )
    own = [n for n in missing if n != OUTPUT and not is_mtp(n, m)]
    expert = {n: f"expert {found[2]} of layer {found[1]}" for n in own if (found := _OF_EXPERT.match(n))}
    parts = Counter(expert.values())
    if lost := [one for one, count in parts.items() if count == _EXPERT_PARTS]:
        yield Fault(f"{some(lost)} missing; a layer has {m.experts} experts", again(m))
    left = [n for n in own if parts.get(expert.get(n, "")) != _EXPERT_PARTS]
    if left:
        yield Fault(f"missing, {len(left):,} of {len(expected):,} tensors: {_kinds(left)}", again(m))


def _extra(m: Model, expected: Tensors, there: Entries) -> Iterator[Fault]:
    extra = [n for n in there if n not in expected and not (m.tied and n == OUTPUT)]
    number = {n: int(found[1]) for n in there if (found := _OF_LAYER.match(n))}
    known = m.layers + m.mtp_layers
    predicts = {number[n] for n in number if ".eh_proj." in n} | {*range(m.layers, known)}
    dropped = m.mtp is Mtp.drop
    further = [n for n in extra if number.get(n, 0) >= known and number[n] in predicts]
    if further and not dropped:
        yield Fault(
            f"{some(further)} of multi-token-prediction layers, but model.mtp_layers={m.mtp_layers}",
            "write model.mtp=drop; or write model.mtp_layers=N and set num_nextn_predict_layers to N in config.json",
        )
    beyond = [n for n in extra if number.get(n, 0) >= known and number[n] not in predicts]
    if beyond:
        yield Fault(f"{some(beyond)} of layers beyond model.layers={m.layers}", again(m))
    left = [n for n in extra if number.get(n, 0) < known and not (dropped and is_mtp(n, m))]
    if left:
        yield Fault(f"{_counted(left)} that no part of {m.name} uses: {_kinds(left)}", again(m))


def _shapes(m: Model, expected: Tensors, there: Entries) -> Iterator[Fault]:
    shapes = expected | ({OUTPUT: expected[EMBEDDING]} if m.tied else {})
    wrong = [n for n, shape in shapes.items() if n in there and there[n].shape != shape]
    rows = {there[n].shape[0] for n in wrong if shapes[n] == (m.vocab, m.hidden) and there[n].shape[1:] == (m.hidden,)}
    if len(rows) == 1 and all(shapes[n] == (m.vocab, m.hidden) for n in wrong):
        (vocab,) = rows
        yield Fault(
            f"{some(wrong)} of {vocab:,} rows, but model.vocab={m.vocab}",
            f"write model.vocab={vocab}, with vocab_size {vocab} in config.json, or model.checkpoint=FOLDER of a {m.name}",
        )
    elif wrong:
        shown = [f"{n} is {list(there[n].shape)}, not {list(shapes[n])}" for n in _first_of_kinds(wrong)]
        yield Fault(f"{_counted(wrong)} of another shape: {'; '.join(shown)}", again(m))


def _counted(names: list[str]) -> str:
    return f"{len(names):,} tensor{'s' if len(names) > 1 else ''}"


def _kinds(names: Iterable[str]) -> str:
    """Return the first few kinds of names as text. Names that differ only in numbers are one kind."""
    kinds = _by_kind(names)
    shown = [
        f"{like[0]}{f' and {len(like) - 1:,} like it' if len(like) > 1 else ''}"
        for like in list(kinds.values())[:SHOWN]
    ]
    more = f", and {len(kinds) - SHOWN} more kinds" if len(kinds) > SHOWN else ""
    return ", ".join(shown) + more


def _first_of_kinds(names: Iterable[str]) -> list[str]:
    return [like[0] for like in list(_by_kind(names).values())[:SHOWN]]


def _by_kind(names: Iterable[str]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in names:
        kinds[re.sub(r"\d+", "N", name)].append(name)
    return kinds
