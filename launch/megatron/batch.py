"""Conversion of packed sequences to the tensors of one micro-batch on this rank."""

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
    """One packed micro-batch on one context-parallel rank. t: its tokens on this rank.

    tokens, labels: [1, t] int64; the label of a token is the next token. supervised: [1, t] bool; whether the label counts.
    packed: the boundaries of the padded sequences.
    """

    tokens: Tensor
    labels: Tensor
    supervised: Tensor
    packed: Packed


def pack(data: Dataset, sequences: Sequence[int], r: Recipe, cp_rank: int, device: torch.device) -> Batch:
    """Pad each sequence at its end, concatenate the sequences, and return this rank's zigzag part of each.

    Padding is token 0 without supervision. It follows a sequence's tokens, so causal attention never sees it.
    """
    layout, multiple = r.layout, sequence_multiple(r.layout)
    lengths = [-(-data.lengths[s] // multiple) * multiple for s in sequences]
    lengths[-1] += -sum(lengths) % batch_multiple(layout, EngineName.megatron)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
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
            positions = zigzag_positions(length, layout.cp, cp_rank)
            tokens, labels, supervised = tokens[positions], labels[positions], supervised[positions]
        parts.append((tokens, labels, supervised))
    tokens, labels, supervised = (onto(device, torch.cat(column).unsqueeze(0)) for column in zip(*parts, strict=True))
    return Batch(tokens, labels, supervised, packed_of(r.model, lengths, device, layout.cp, cp_rank))
