"""The embedded engine's step on one GPU, in this process."""

from functools import partial
from typing import Any

import torch

from launch.bench.gpu.cases import Planned
from launch.bench.gpu.inputs import WARM_UP, RandomTokens, device_here, random_weights
from launch.bench.gpu.timing import timed
from launch.cluster.rendezvous import open_store
from launch.megatron.rank import Rank
from launch.megatron.rank_place import Place


def measure_embedded(planned: Planned) -> dict[str, Any]:
    """Train the case's steps. Return `seconds` of each step, `loss` of the first, and `peak` in bytes."""
    r, sequences = planned.recipe, planned.case.sequences
    store, port = open_store("127.0.0.1")
    data: Any = RandomTokens([*sequences, min(WARM_UP, max(sequences))], r.model.vocab)
    read = random_weights(r, device_here())
    rank = Rank(r, Place(0, 0, "127.0.0.1", port), (data, planned.plan.schedule), None, read)
    # Warm up: compile and load kernels and, if tensors are offloaded, pin host memory for them.
    rank.gradient(0) if r.layout.offload else rank.sequence_gradient(len(sequences))
    if rank.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps = [timed(partial(rank.train_step, step), rank.device) for step in range(planned.case.steps)]
    figures = {"seconds": [s for _, s in steps], "loss": steps[0][0]["loss"], "peak": rank.peak_memory()}
    rank.leave()
    del store
    return figures
