"""From sequences of the packed data set to the tensors of one micro-batch on this rank."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_prep.pack.dataset import Dataset
from launch.model.attention import Packed, packed_of, zigzag_positions
from launch.model.offload_streams import onto
from recipes.config import EngineName, Recipe
from recipes.layout import batch_multiple, sequence_multiple


@dataclass(frozen=True)
class Batch:
    """One packed micro-batch on one context-parallel rank; t is its tokens here.

    tokens, labels [1, t] int64: the label of a token is the one after it. supervised [1, t] bool: whether the label
    counts. packed: where the padded sequences lie.
    """

    tokens: Tensor
    labels: Tensor
    supervised: Tensor
    packed: Packed


def pack(data: Dataset, sequences: Sequence[int], r: Recipe, cp_rank: int, device: torch.device) -> Batch:
    """Concatenates the sequences, each padded at its end, and keeps this rank's zigzag part of every one.

    Padding is token 0 without supervision; it comes after a sequence's tokens, so causal attention never sees it.
    """
    layout, multiple = r.layout, sequence_multiple(r.layout)
    lengths = [-(-data.lengths[s] // multiple) * multiple for s in sequences]
    lengths[-1] += -sum(lengths) % batch_multiple(layout, EngineName.megatron)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for sequence, length in zip(sequences, lengths, strict=True):
        tokens = torch.zeros(length, dtype=torch.long)
        labels = torch.zeros(length, dtype=torch.long)
        supervised = torch.zeros(length, dtype=torch.bool)
        ids = torch.from_numpy(data.tokens(sequence).astype("int64"))
        tokens[: len(ids)] = ids
        labels[: len(ids) - 1] = ids[1:]
        for start, end in data.spans(sequence):
            supervised[start - 1 : end - 1] = True
        if layout.cp > 1:
            here = zigzag_positions(length, layout.cp, cp_rank)
            tokens, labels, supervised = tokens[here], labels[here], supervised[here]
        kept.append((tokens, labels, supervised))
    tokens, labels, supervised = (onto(device, torch.cat(parts).unsqueeze(0)) for parts in zip(*kept, strict=True))
    return Batch(tokens, labels, supervised, packed_of(r.model, lengths, device, layout.cp, cp_rank))
