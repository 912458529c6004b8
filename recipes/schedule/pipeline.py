"""Exact simulation of Megatron's pipeline schedules, 1F1B and interleaved, for micro-batches of different sizes.

Source: Narayanan et al. 2021, arXiv 2104.04473.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np


class Pass(NamedTuple):
    """One forward or backward pass of a micro-batch through one chunk of layers."""

    forward: bool
    stage: int
    chunk: int
    micro_batch: int
    after: int  # index in the order of the pass that must end before this one starts; -1 if there is none


@dataclass(frozen=True)
class Pipeline:
    """A pipeline. Messages between stages cost no time."""

    stages: int = 1
    backward: float = 2.0  # default time of a backward pass / that of its forward pass: 2, or 3 with full recomputation
    chunks: int = 1  # chunks of layers per stage

    def makespan(self, forward: np.ndarray, backward: np.ndarray | None = None) -> np.ndarray:
        """Return [c] times from the first forward to the last backward pass, for c pipelines at once.

        forward: [c, m] time of each micro-batch's forward pass on **one** stage, in running order, or [stages, c, m] if stages
        differ. A pipeline with fewer micro-batches has zeros at its end. backward: likewise; None means `self.backward` times
        the forward pass.
        """
        ends = self._ends(*self._durations(forward, backward))
        return np.maximum.reduce(ends)

    def passes(self, forward: np.ndarray, backward: np.ndarray) -> list[tuple[Pass, float, float]]:
        """Return every pass of one pipeline with its start and end. forward, backward: [stages, m] times."""
        down, up = self._durations(forward[:, None], backward[:, None])
        order = _order(self.stages, forward.shape[-1], self.chunks)
        ends = [float(end[0]) for end in self._ends(down, up)]
        takes = [float((down if p.forward else up)[p.stage, p.micro_batch, 0]) for p in order]
        return [(p, end - one, end) for p, end, one in zip(order, ends, takes, strict=True)]

    def _durations(self, forward: np.ndarray, backward: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Return the forward and backward times of one chunk's passes, each [stages, m, c]."""
        backward = forward * self.backward if backward is None else backward
        shape = (self.stages, *forward.shape[-2:])
        down, up = (np.broadcast_to(x, shape).swapaxes(1, 2) / self.chunks for x in (forward, backward))
        return np.ascontiguousarray(down), np.ascontiguousarray(up)

    def _ends(self, down: np.ndarray, up: np.ndarray) -> list[np.ndarray]:
        """Return the [c] end of every pass, in the order of `_order`. down, up: forward and backward times, [stages, m, c]."""
        _, batches, count = down.shape
        free = [np.zeros(count)] * self.stages  # end of each stage's last pass so far
        ends: list[np.ndarray] = []
        for p in _order(self.stages, batches, self.chunks):
            ready = free[p.stage] if p.after < 0 else np.maximum(free[p.stage], ends[p.after])
            free[p.stage] = ready + (down if p.forward else up)[p.stage, p.micro_batch]
            ends.append(free[p.stage])
        return ends


@cache
def _order(stages: int, batches: int, chunks: int) -> list[Pass]:
    """Return all passes, each after the passes it waits for. The passes of one stage are in its running order."""
    waiting = [_of_stage(stages, batches, chunks, s) for s in range(stages)]
    place: dict[tuple[bool, int, int, int], int] = {}
    order: list[Pass] = []
    at = [0] * stages
    while len(order) < 2 * stages * batches * chunks:
        before = len(order)
        for s in range(stages):
            while at[s] < len(waiting[s]):
                forward, chunk, i = waiting[s][at[s]]
                needed = _needed(forward, s, chunk, i, stages, chunks)
                if needed is not None and needed not in place:
                    break
                place[forward, s, chunk, i] = len(order)
                order.append(Pass(forward, s, chunk, i, -1 if needed is None else place[needed]))
                at[s] += 1
        assert len(order) > before, "a pipeline schedule never waits for itself"
    return order


def _needed(
    forward: bool, stage: int, chunk: int, i: int, stages: int, chunks: int
) -> tuple[bool, int, int, int] | None:
    """Return the pass whose output this pass needs, or None.

    A backward pass also needs its own forward pass, but that one is earlier on the same stage.
    """
    if forward:
        if stage:
            return True, stage - 1, chunk, i
        return (True, stages - 1, chunk - 1, i) if chunk else None
    if stage < stages - 1:
        return False, stage + 1, chunk, i
    return (False, 0, chunk + 1, i) if chunk < chunks - 1 else None


def _of_stage(stages: int, batches: int, chunks: int, stage: int) -> list[tuple[bool, int, int]]:
    """Return (forward, chunk, micro-batch) of every pass of a stage, in running order.

    A stage runs some forward passes (warm-up), then one forward and one backward pass alternately, then the remaining backward
    passes. In the interleaved schedule, `stages` micro-batches pass one chunk before the next chunk (Megatron's schedules.py,
    `get_pp_rank_microbatches` and `get_schedule_table`).
    """
    table = (
        [
            (chunk, i)
            for group in range(0, batches, stages)
            for chunk in range(chunks)
            for i in range(group, min(group + stages, batches))
        ]
        if chunks > 1
        else [(0, i) for i in range(batches)]
    )
    down = [(True, chunk, i) for chunk, i in table]
    up = [(False, chunks - 1 - chunk, i) for chunk, i in table]
    warm = (stages - stage - 1) * 2 + (chunks - 1) * stages if chunks > 1 else stages - stage - 1
    warm = min(warm, len(table))
    paired = [one for pair in zip(down[warm:], up, strict=False) for one in pair]
    return [*down[:warm], *paired, *up[len(table) - warm :]]


@cache
def in_flight(stages: int, batches: int, chunks: int, stage: int) -> int:
    """Return the most forward passes whose activations a stage holds at once."""
    held = most = 0
    for forward, *_ in _of_stage(stages, batches, chunks, stage):
        held += 1 if forward else -1
        most = max(most, held)
    return most
