"""An exact simulation of the 1F1B pipeline schedule (Narayanan et al. 2021, arXiv 2104.04473) over micro-batches of unlike
sizes, as Megatron runs it without interleaving."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Pipeline:
    """stages: of one pipeline. backward: a backward pass takes so many times its forward pass: 2, or 3 with full
    recomputation. The stages are taken to be equal and their messages to be free."""

    stages: int = 1
    backward: float = 2.0

    def makespan(self, forward: np.ndarray) -> np.ndarray:
        """Time from the first forward to the last backward pass, for many pipelines at once.

        forward: [c, m] time of each micro-batch's forward pass on **one** stage, in the order they run; a pipeline with
        fewer micro-batches has zeros at its end. Returns [c].

        Stage s runs stages - 1 - s forward passes, then one forward and one backward in turn, then what is left. Counting
        F of micro-batch i on stage s as tick 2 i + s and its B as tick 2 i + 2 stages - 1 - s puts every pass after those
        it waits for, on its own stage and on its neighbours, and gives a stage one pass a tick at most.
        """
        count, batches = forward.shape
        forward = np.ascontiguousarray(forward.T)
        backward = forward * self.backward
        free = np.zeros((self.stages, count))  # when a stage has ended its last pass
        done = np.zeros((self.stages, batches, count))  # when a stage ended its last pass of a micro-batch
        none = np.zeros(count)
        for tick in range(2 * (batches - 1) + 2 * self.stages):
            for s in range(self.stages):
                down = (tick - s) % 2 == 0
                i = (tick - s) // 2 if down else (tick + s + 1 - 2 * self.stages) // 2
                if not 0 <= i < batches:
                    continue
                if down:
                    before, takes = done[s - 1, i] if s else none, forward[i]
                else:
                    before, takes = done[min(s + 1, self.stages - 1), i], backward[i]
                free[s] = done[s, i] = np.maximum(free[s], before) + takes
        return free.max(axis=0)
