"""An exact simulation of the 1F1B pipeline schedule (Narayanan et al. 2021, arXiv 2104.04473) over micro-batches of unlike
sizes, as Megatron runs it without interleaving."""

import numpy as np


def makespan(forward: np.ndarray, stages: int, backward: float) -> np.ndarray:
    """Time from the first forward to the last backward pass, for many pipelines at once.

    forward: [c, m] time of each micro-batch's forward pass on **one** stage, in the order they run; a pipeline with fewer
    micro-batches has zeros at its end. backward: a backward pass takes so many times its forward pass: 2, or 3 with full
    recomputation. Returns [c].

    Stage s runs stages - 1 - s forward passes, then one forward and one backward in turn, then what is left. Counting F of
    micro-batch i on stage s as tick 2 i + s and its B as tick 2 i + 2 stages - 1 - s puts every pass after those it waits
    for, on its own stage and on its neighbours, and gives a stage one pass a tick at most.
    """
    count, batches = forward.shape
    forward = np.ascontiguousarray(forward.T)
    back = forward * backward
    free = np.zeros((stages, count))  # when a stage has ended its last pass
    done = np.zeros((stages, batches, count))  # when a stage ended its last pass of a micro-batch
    zero = np.zeros(count)
    for tick in range(2 * (batches - 1) + 2 * stages):
        for s in range(stages):
            if (tick - s) % 2 == 0:
                i = (tick - s) // 2
                if 0 <= i < batches:
                    before = done[s - 1, i] if s else zero
                    free[s] = done[s, i] = np.maximum(free[s], before) + forward[i]
            else:
                i = (tick + s + 1 - 2 * stages) // 2
                if 0 <= i < batches:
                    before = done[s + 1, i] if s < stages - 1 else done[s, i]
                    free[s] = done[s, i] = np.maximum(free[s], before) + back[i]
    return free.max(axis=0)
