"""What tells two tensors apart with neither at hand: sums over the bits of every row and of every column, 64 bits each.

A row's sum is of its elements' bits, each times an odd number of its column's, modulo 2**64. Another element makes another sum; two
rows of unlike bits have the same one by a chance of about 2**-64. Sums add up: a tensor may come in boxes, in any order.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_BITS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Digest:
    """rows, columns: of all of them in their order. any_rows, any_columns: of all of them in whatever order."""

    rows: int
    any_rows: int
    columns: int
    any_columns: int


class Sums:
    """Of a tensor: of a vector every element is a row."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._rows = np.zeros(shape[0], np.uint64)
        self._columns = np.zeros(shape[1] if len(shape) > 1 else 1, np.uint64)

    def add(self, box: Tensor, rows: np.ndarray, column: int = 0) -> None:
        """A part of the tensor, [rows, columns]. rows: where each of its rows is in the tensor; column: where its first column is."""
        bits = box.view(_BITS[box.element_size()]).long()
        columns = np.arange(column, column + box.shape[1])
        self._rows[rows] += _times(bits, columns)
        self._columns[columns] += _times(bits.T, rows)

    def digest(self) -> Digest:
        return Digest(*_of(self._rows), *_of(self._columns))


def _of(sums: np.ndarray) -> tuple[int, int]:
    """In their order, and in whatever order."""
    mixed = _mixed(sums)
    placed = _mixed(mixed ^ _odd(np.arange(len(sums))))
    return int(placed.sum(dtype=np.uint64)), int(mixed.sum(dtype=np.uint64))


def _times(bits: Tensor, numbers: np.ndarray) -> np.ndarray:
    found: np.ndarray = (bits @ torch.from_numpy(_odd(numbers).view(np.int64))).numpy().view(np.uint64)
    return found


def _odd(numbers: np.ndarray) -> np.ndarray:
    """A random odd number for each of them."""
    return _mixed(numbers.astype(np.uint64)) | np.uint64(1)


def _mixed(values: np.ndarray) -> np.ndarray:
    """Splitmix64: every bit of a value decides over every bit of what comes out."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
