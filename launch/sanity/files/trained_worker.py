"""Work of the worker processes that compare an export with the trainer's checkpoint.

Each reads a few parameters, block by block, and returns the digests that the export's tensors in them should have. It is a
separate module because every worker imports it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from launch.sanity.files import trainers
from launch.sanity.tensors import compare_worker
from launch.sanity.tensors.digests import Digest, Sums
from launch.weights import torch_dist
from launch.weights.dtypes import DTYPES
from launch.weights.safetensors_file import Entry
from launch.weights.torch_dist import Piece
from recipes.config import Model
from recipes.errors import CheckpointError


@dataclass(frozen=True)
class Parameter:
    """A parameter in a checkpoint.

    key, lead: the stored tensor that holds it, and its leading indices there (layer, expert). shape: the parameter's own.
    pieces: the pieces of `key` that hold it. tensors: the export's tensors that are parts of it, by name.
    """

    name: str
    key: str
    lead: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]
    tensors: dict[str, Entry]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def look(checkpoint: Path, m: Model, parameters: list[Parameter]) -> dict[str, Digest]:
    """Return the expected digest of every tensor of the export in these parameters, in the export's dtype."""
    return {name: found for p in parameters for name, found in _digests(checkpoint, m, p).items()}


def _digests(checkpoint: Path, m: Model, p: Parameter) -> dict[str, Digest]:
    """Return the digests of one parameter's tensors. Raise `CheckpointError` if the checkpoint lacks some of their elements."""
    sums = {name: Sums(entry.shape) for name, entry in p.tensors.items()}
    homes = trainers.homes(p.name, p.shape[0], m)
    targets, seen = {}, dict.fromkeys(p.tensors, 0)  # by tensor: for each row of the parameter its row there, or -1
    for name, entry in p.tensors.items():
        targets[name] = np.full(p.shape[0], -1)
        taken = homes[name][: entry.shape[0]]  # rows that pad a vocabulary come after all others
        targets[name][taken] = np.arange(len(taken))
    for values, rows, column in _boxes(checkpoint, p):
        for name, target in targets.items():
            row = target[rows]
            part = values[torch.from_numpy(row >= 0)]
            sums[name].add(part.to(DTYPES[p.tensors[name].dtype]), row[row >= 0], column)
            seen[name] += part.numel()
    for name, entry in p.tensors.items():
        if seen[name] != math.prod(entry.shape):
            raise CheckpointError(
                f"'{checkpoint}' holds only {seen[name]:,} of the {math.prod(entry.shape):,} elements of {name}",
                "write step=N of another checkpoint",
            )
    return {name: one.digest() for name, one in sums.items()}


def _boxes(checkpoint: Path, p: Parameter) -> Iterator[tuple[Tensor, np.ndarray, int]]:
    """Yield boxes of the parameter: values [rows, columns], the index of each row, and the index of the first column."""
    lead = len(p.lead)
    for piece in p.pieces:
        outer, (rows, *across) = piece.shape[:lead], piece.shape[lead:]
        first = piece.start[lead:]
        columns = across[0] if across else 1
        wanted = (
            int(np.ravel_multi_index([a - b for a, b in zip(p.lead, piece.start, strict=False)], outer)) if lead else 0
        )
        at = 0
        for flat in torch_dist.stream(
            checkpoint, p.key, piece, p.dtype, columns * max(1, compare_worker.BLOCK // columns)
        ):
            values = flat.view(-1, columns)
            slab, row = np.divmod(np.arange(at, at + len(values)), rows)
            at += len(values)
            inside = slab == wanted  # rows of this layer and expert
            yield values[torch.from_numpy(inside)], row[inside] + first[0], first[1] if across else 0
