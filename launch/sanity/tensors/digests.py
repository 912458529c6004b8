"""Digests that compare two tensors without holding both in memory: a 64-bit sum over the bits of every row and every column.

A row's sum is the sum of its elements' bits, each multiplied by an odd number that belongs to its column, modulo 2**64. Changing one
element changes the sum; two different rows have the same sum with a probability of about 2**-64. Sums are additive: a tensor may
be added in boxes, in any order.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_BITS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Digest:
    """rows, columns: digests of all rows or columns that depend on their order. any_rows, any_columns: independent of the order."""

    rows: int
    any_rows: int
    columns: int
    any_columns: int


class Sums:
    """Accumulates the row and column sums of a tensor. In a vector every element is a row."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._rows = np.zeros(shape[0], np.uint64)
        self._columns = np.zeros(shape[1] if len(shape) > 1 else 1, np.uint64)

    def add(self, box: Tensor, rows: np.ndarray, column: int = 0) -> None:
        """Add a part of the tensor, [rows, columns]. rows: the tensor's index of each of its rows; column: of its first column."""
        bits = box.view(_BITS[box.element_size()]).long()
        columns = np.arange(column, column + box.shape[1])
        self._rows[rows] += _times(bits, columns)
        self._columns[columns] += _times(bits.T, rows)

    def digest(self) -> Digest:
        return Digest(*_both_digests(self._rows), *_both_digests(self._columns))


def _both_digests(sums: np.ndarray) -> tuple[int, int]:
    """Return the digest that depends on the order of the sums, and the one that does not."""
    mixed = _mixed(sums)
    placed = _mixed(mixed ^ _odd(np.arange(len(sums))))
    return int(placed.sum(dtype=np.uint64)), int(mixed.sum(dtype=np.uint64))


def _times(bits: Tensor, numbers: np.ndarray) -> np.ndarray:
    """Return each row's sum of bits x odd number of the column, modulo 2**64. bits: [rows, columns]; numbers: column indices."""
    sums: np.ndarray = (bits @ torch.from_numpy(_odd(numbers).view(np.int64))).numpy().view(np.uint64)
    return sums


def _odd(numbers: np.ndarray) -> np.ndarray:
    """Return a pseudo-random odd number for each of the numbers."""
    return _mixed(numbers.astype(np.uint64)) | np.uint64(1)


def _mixed(values: np.ndarray) -> np.ndarray:
    """Hash the values with Splitmix64: every bit of the result depends on every bit of the value."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
