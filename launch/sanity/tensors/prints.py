"""Fingerprints: the same few elements of every tensor of a shape, of an export and of its base, taken while both are read."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from launch.sanity.tensors.bands import Bands


@dataclass(frozen=True)
class Wanted:
    """most: elements of a tensor, and of all its bands together, that are taken."""

    bands: Bands
    most: int


@dataclass(frozen=True)
class Prints:
    """new, base: of the export's tensor and the base's of its name, at the same places. other: the base's where a mistake of that
    name would have the export's. new_bands, base_bands: [bands, elements], each at the same places in its band."""

    new: np.ndarray
    base: np.ndarray
    other: dict[str, np.ndarray]
    new_bands: np.ndarray
    base_bands: np.ndarray
    bands: Bands


class Taker:
    """Takes the prints of a pair of tensors from their blocks, in order."""

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
        self._base, self._base_bands = {name: _Sample(places) for name, places in at.items()}, _Sample(in_bands)

    def add(self, new: Tensor, base: Tensor, start: int) -> None:
        """start: the number of their first elements."""
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
    """The elements at some places of a tensor."""

    def __init__(self, places: np.ndarray) -> None:
        self.values = np.zeros(places.shape, np.float32)
        self._order = places.ravel().argsort()
        self._places = places.ravel()[self._order]

    def add(self, block: Tensor, start: int) -> None:
        first, end = np.searchsorted(self._places, [start, start + len(block)])
        found = block[torch.from_numpy(self._places[first:end] - start)].float()
        self.values.ravel()[self._order[first:end]] = found.nan_to_num_(0.0, 0.0, 0.0).numpy()


def _spread(count: int, most: int) -> np.ndarray:
    """Some of so many places, the same for every tensor that has as many."""
    if count <= 4 * most:
        return np.random.default_rng(count).permutation(count)[:most]
    return np.random.default_rng(count).integers(count, size=most)


def _orders(row: np.ndarray, bands: Bands) -> dict[str, np.ndarray]:
    """Where rows come from that are in another order than the base's. Of a head's turned rows those of a pair are half of them apart,
    or side by side."""
    first, inside, half = row - row % bands.head, row % bands.head, bands.turned // 2
    apart = inside % 2 * half + inside // 2
    beside = inside % half * 2 + inside // half
    turned = inside < bands.turned
    return {
        "with the rows of a pair side by side": first + np.where(turned, apart, inside),
        "with the rows of a pair apart": first + np.where(turned, beside, inside),
    }
