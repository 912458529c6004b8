"""What the workers of the comparison with the trainer's checkpoint do: each reads a few parameters, block by block, and says what the
tensors of an export that are in them should be.

A module of its own, as every worker imports it.
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
from launch.sanity.tensors.compare_worker import DTYPES
from launch.sanity.tensors.digests import Digest, Sums
from launch.weights import torch_dist
from launch.weights.safetensors_file import Entry
from launch.weights.torch_dist import Piece
from recipes.config import Model
from recipes.errors import CheckpointError


@dataclass(frozen=True)
class Parameter:
    """A parameter in a checkpoint: its name, and the pieces of `key` at `lead` that hold it. shape: its own. tensors: of the export
    in it, by name."""

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
    """The digest of every tensor of the export, as the checkpoint has it, in the export's dtype."""
    return {name: found for p in parameters for name, found in _digests(checkpoint, m, p).items()}


def _digests(checkpoint: Path, m: Model, p: Parameter) -> dict[str, Digest]:
    sums = {name: Sums(entry.shape) for name, entry in p.tensors.items()}
    homes = trainers.homes(p.name, p.shape[0], m)
    places, seen = {}, dict.fromkeys(p.tensors, 0)
    for name, entry in p.tensors.items():
        places[name] = np.full(p.shape[0], -1)
        taken = homes[name][: entry.shape[0]]  # rows that pad a vocabulary come after all others
        places[name][taken] = np.arange(len(taken))
    for values, rows, column in _boxes(checkpoint, p):
        for name, place in places.items():
            here = place[rows]
            mine = values[torch.from_numpy(here >= 0)]
            sums[name].add(mine.to(DTYPES[p.tensors[name].dtype]), here[here >= 0], column)
            seen[name] += mine.numel()
    for name, entry in p.tensors.items():
        if seen[name] != math.prod(entry.shape):
            raise CheckpointError(
                f"'{checkpoint}' holds {seen[name]:,} of the {math.prod(entry.shape):,} elements of {name}",
                "write step=N of another checkpoint",
            )
    return {name: one.digest() for name, one in sums.items()}


def _boxes(checkpoint: Path, p: Parameter) -> Iterator[tuple[Tensor, np.ndarray, int]]:
    """Some of the parameter's values, [rows, columns], where each of these rows is, and the first column."""
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
            mine = slab == wanted
            yield values[torch.from_numpy(mine)], row[mine] + first[0], first[1] if across else 0
