"""An exact simulation of the pipeline schedules that Megatron runs, 1F1B and interleaved (Narayanan et al. 2021, arXiv
2104.04473), over micro-batches of unlike sizes."""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np


class Pass(NamedTuple):
    """One forward or backward pass of a micro-batch through one chunk of layers. after: the passes, by place in the order,
    that must have ended; -1 for none."""

    forward: bool
    stage: int
    chunk: int
    micro_batch: int
    after: int


@dataclass(frozen=True)
class Pipeline:
    """stages: of one pipeline, each with `chunks` of its layers. backward: a backward pass takes so many times its forward
    pass where nothing else is said: 2, or 3 with full recomputation. Messages between stages are taken to be free."""

    stages: int = 1
    backward: float = 2.0
    chunks: int = 1

    def makespan(self, forward: np.ndarray, backward: np.ndarray | None = None) -> np.ndarray:
        """Time from the first forward to the last backward pass, for many pipelines at once.

        forward: [c, m] time of each micro-batch's forward pass on **one** stage, in the order they run, or [stages, c, m]
        where stages are not alike; a pipeline with fewer micro-batches has zeros at its end. backward: the same. Returns [c].
        """
        ends = self._ends(*self._durations(forward, backward))
        return np.maximum.reduce(ends)

    def passes(self, forward: np.ndarray, backward: np.ndarray) -> list[tuple[Pass, float, float]]:
        """Every pass of one pipeline with its start and its end; forward, backward: [stages, m]."""
        down, up = self._durations(forward[:, None], backward[:, None])
        order = _order(self.stages, forward.shape[-1], self.chunks)
        ends = [float(end[0]) for end in self._ends(down, up)]
        takes = [float((down if p.forward else up)[p.stage, p.micro_batch, 0]) for p in order]
        return [(p, end - one, end) for p, end, one in zip(order, ends, takes, strict=True)]

    def _durations(self, forward: np.ndarray, backward: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """[stages, m, c] times of one chunk's passes."""
        backward = forward * self.backward if backward is None else backward
        shape = (self.stages, *forward.shape[-2:])
        down, up = (np.broadcast_to(x, shape).swapaxes(1, 2) / self.chunks for x in (forward, backward))
        return np.ascontiguousarray(down), np.ascontiguousarray(up)

    def _ends(self, down: np.ndarray, up: np.ndarray) -> list[np.ndarray]:
        _, batches, count = down.shape
        free = [np.zeros(count)] * self.stages  # when a stage has ended its last pass
        ends: list[np.ndarray] = []
        for p in _order(self.stages, batches, self.chunks):
            ready = free[p.stage] if p.after < 0 else np.maximum(free[p.stage], ends[p.after])
            free[p.stage] = ready + (down if p.forward else up)[p.stage, p.micro_batch]
            ends.append(free[p.stage])
        return ends


@cache
def _order(stages: int, batches: int, chunks: int) -> list[Pass]:
    """All passes in an order in which each comes after those it waits for, its own stage's in the order it runs them."""
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
    """The pass whose output this one takes in; its own forward pass comes earlier on the same stage."""
    if forward:
        if stage:
            return True, stage - 1, chunk, i
        return (True, stages - 1, chunk - 1, i) if chunk else None
    if stage < stages - 1:
        return False, stage + 1, chunk, i
    return (False, 0, chunk + 1, i) if chunk < chunks - 1 else None


def _of_stage(stages: int, batches: int, chunks: int, stage: int) -> list[tuple[bool, int, int]]:
    """(forward, chunk, micro-batch) in the order a stage runs them: some forward passes, then one forward and one backward in
    turn, then what is left. Interleaved, `stages` micro-batches pass one chunk before the next (Megatron's schedules.py,
    `get_pp_rank_microbatches` and `get_schedule_table`)."""
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
    """Most chunks' activations that a stage holds at once."""
    held = most = 0
    for forward, *_ in _of_stage(stages, batches, chunks, stage):
        held += 1 if forward else -1
        most = max(most, held)
    return most
