"""Work of the file checks' worker processes: each compares a few tensors of an export with the base's, block by block.

It is a separate module because every worker imports it. A worker needs memory for a few blocks, whatever the tensors' sizes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from launch.sanity.tensors.digests import Digest, Sums
from launch.sanity.tensors.prints import Prints, Taker, Wanted
from launch.weights.dtypes import DTYPES
from launch.weights.safetensors_file import Entry
from recipes.errors import CheckpointError

BLOCK = 1 << 17  # elements of a block (at least one row); a few blocks fit into a core's cache
_BITS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Stored:
    """A tensor's location on disk."""

    path: Path
    entry: Entry


@dataclass(frozen=True)
class Pair:
    """A tensor of the export and the base's tensor of the same name and shape, if there is one.

    wanted: the fingerprints to take of both.
    """

    name: str
    new: Stored
    base: Stored | None
    wanted: Wanted

    @property
    def size(self) -> int:
        return self.new.entry.size


@dataclass(frozen=True)
class Reach:
    """Limits of what training can change. rates: the sum of the learning rates over all steps. decay: further relative change
    of an element, by weight decay and rounding."""

    rates: float
    decay: float


@dataclass
class BaseDifference:
    """Difference of a tensor from the base's.

    changed: number of elements that differ as bf16. largest: largest absolute change. beyond: largest change minus what
    `Reach.decay` allows. movable: number of elements whose bf16 value the sum of the rates can change. equal: whether both are
    equal bit for bit. rounded: whether the tensor equals the base rounded to bf16. zero: whether the base is all zero.
    """

    prints: Prints | None = None
    changed: int = 0
    largest: float = 0.0
    beyond: float = 0.0
    movable: int = 0
    equal: bool = True
    rounded: bool = True
    zero: bool = True


@dataclass
class Seen:
    """What was measured of one tensor of the export. not_finite: number of NaN or infinite elements. zero: whether all are zero."""

    name: str
    shape: tuple[int, ...]
    digest: Digest | None = None  # only for a comparison with the trainer's checkpoint
    elements: int = 0
    not_finite: int = 0
    zero: bool = True
    base: BaseDifference | None = None  # None if the base has no such tensor


def start() -> None:
    """Initialize a worker with one thread: blocks are small, so that more threads cost more than they gain."""
    torch.set_num_threads(1)


def look(reach: Reach, digested: bool, pairs: list[Pair]) -> list[Seen]:
    """Measure a batch of tensors. digested: whether to compute digests."""
    return [_look(reach, digested, pair) for pair in pairs]


def _look(reach: Reach, digested: bool, pair: Pair) -> Seen:
    shape = pair.new.entry.shape
    seen, row = Seen(pair.name, shape), math.prod(shape[1:])
    taker = Taker(shape, pair.wanted) if pair.base and math.prod(shape) else None
    sums = Sums(shape) if digested and shape else None
    seen.base = BaseDifference() if pair.base else None
    olds = _blocks(pair.base) if pair.base else _blocks(pair.new)
    for new, old in zip(_blocks(pair.new), olds, strict=True):
        start, seen.elements = seen.elements, seen.elements + new.numel()
        finite = new.isfinite()
        seen.not_finite += new.numel() - int(finite.sum())
        seen.zero &= not bool(new.any())
        if seen.base is not None:
            _compare(seen.base, reach, new, old, finite)
        if taker is not None:
            taker.add(new, old, start)
        if sums is not None:
            sums.add(new.view(-1, row), np.arange(start // row, seen.elements // row))
    if seen.base is not None and taker is not None:
        seen.base.prints = taker.prints()
    if sums is not None:
        seen.digest = sums.digest()
    return seen


def _blocks(stored: Stored) -> Iterator[Tensor]:
    """Yield a tensor's elements in blocks of whole rows. Raise `CheckpointError` if the file is too short."""
    dtype = DTYPES[stored.entry.dtype]
    row = math.prod(stored.entry.shape[1:])
    size = row * max(1, BLOCK // max(1, row)) * dtype.itemsize
    left = stored.entry.size
    with stored.path.open("rb") as file:
        file.seek(stored.entry.start)
        while left:
            content = bytearray(min(left, size))
            if file.readinto(content) != len(content):
                raise CheckpointError(f"'{stored.path}' ended while it was read", "copy it once more")
            left -= len(content)
            yield torch.frombuffer(content, dtype=dtype)


def _compare(difference: BaseDifference, reach: Reach, new: Tensor, old: Tensor, finite: Tensor) -> None:
    """Add one block to the difference. new, old: the export's and the base's elements; finite: mask of new's finite elements."""
    size = old.abs().float()
    difference.zero &= not bool(size.any())
    # Half a unit in the last place of bf16 is at most 2**-8 of an element.
    difference.movable += int((size < reach.rates * 2**8).sum())
    if new.dtype == old.dtype and torch.equal(_bits(new), _bits(old)):
        difference.rounded &= old.dtype == torch.bfloat16 or torch.equal(old, old.bfloat16().to(old.dtype))
        return
    difference.equal = False
    rounded = old.bfloat16()
    difference.rounded &= torch.equal(new.float(), rounded.float())
    difference.changed += int((_bits(new.bfloat16()) != _bits(rounded)).sum())
    change = (new.float() - old.float()).abs_().where(finite, torch.zeros(()))
    difference.largest = max(difference.largest, change.max().item())
    difference.beyond = max(difference.beyond, (change - reach.decay * size).max().item())


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_BITS[tensor.element_size()])
