"""Fingerprints of tensors: a few elements, at the same indices for all tensors of a shape, sampled while export and base are read."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from launch.sanity.tensors.bands import Bands


@dataclass(frozen=True)
class Wanted:
    """What to sample of a tensor. most: number of elements, of the tensor and of all its bands together."""

    bands: Bands
    most: int


@dataclass(frozen=True)
class Prints:
    """Fingerprints of a tensor of the export (new) and of the base's tensor of its name (base), at the same indices.

    other: by the name of a mistake, the base's elements that the export would hold at these indices after that mistake.
    new_bands, base_bands: [bands, elements], at the same indices within each band.
    """

    new: np.ndarray
    base: np.ndarray
    other: dict[str, np.ndarray]
    new_bands: np.ndarray
    base_bands: np.ndarray
    bands: Bands


class Taker:
    """Samples the fingerprints of a pair of tensors from their blocks, which must come in order."""

    def __init__(self, shape: tuple[int, ...], wanted: Wanted) -> None:
        bands = wanted.bands
        rows, columns = shape[0], math.prod(shape[1:])
        row, column = np.divmod(_spread(rows * columns, wanted.most), columns)
        at = {"": row * columns + column}
        if rows == columns > 1:
            at["transposed"] = column * columns + row
        if bands.turned:
            for order, moved in _orders(row, bands).items():
                at[order] = moved * columns + column
        high, wide = (rows // bands.count, columns) if bands.axis == 0 else (rows, columns // bands.count)
        inner, across = np.divmod(_spread(high * wide, max(32, wanted.most // bands.count)), wide)
        number = np.arange(bands.count)[:, None]
        in_bands = (
            (inner + number * high) * columns + across if bands.axis == 0 else inner * columns + across + number * wide
        )
        self._bands = bands
        self._new, self._new_bands = _Sample(at[""]), _Sample(in_bands)
        self._base, self._base_bands = {name: _Sample(indices) for name, indices in at.items()}, _Sample(in_bands)

    def add(self, new: Tensor, base: Tensor, start: int) -> None:
        """Add a block of each tensor. start: index of the blocks' first element in the flat tensors."""
        for sample in (self._new, self._new_bands):
            sample.add(new, start)
        for sample in (*self._base.values(), self._base_bands):
            sample.add(base, start)

    def prints(self) -> Prints:
        base = {name: sample.values for name, sample in self._base.items()}
        return Prints(
            self._new.values, base.pop(""), base, self._new_bands.values, self._base_bands.values, self._bands
        )


class _Sample:
    """The elements at some flat indices of a tensor."""

    def __init__(self, indices: np.ndarray) -> None:
        self.values = np.zeros(indices.shape, np.float32)
        self._order = indices.ravel().argsort()
        self._indices = indices.ravel()[self._order]

    def add(self, block: Tensor, start: int) -> None:
        first, end = np.searchsorted(self._indices, [start, start + len(block)])
        values = block[torch.from_numpy(self._indices[first:end] - start)].float()
        self.values.ravel()[self._order[first:end]] = values.nan_to_num_(0.0, 0.0, 0.0).numpy()


def _spread(count: int, most: int) -> np.ndarray:
    """Return about `most` random indices below `count`, the same for all tensors of `count` elements."""
    if count <= 4 * most:
        return np.random.default_rng(count).permutation(count)[:most]
    return np.random.default_rng(count).integers(count, size=most)


def _orders(row: np.ndarray, bands: Bands) -> dict[str, np.ndarray]:
    """Return, by name of a mistaken row order, the base's row for each of these rows.

    The two rows of a rotated pair can lie half of a head's rotated rows apart, or side by side.
    """
    first, inside, half = row - row % bands.head, row % bands.head, bands.turned // 2
    apart = inside % 2 * half + inside // 2
    adjacent = inside % half * 2 + inside // half
    turned = inside < bands.turned
    return {
        "with the rows of a pair side by side": first + np.where(turned, apart, inside),
        "with the rows of a pair apart": first + np.where(turned, adjacent, inside),
    }
