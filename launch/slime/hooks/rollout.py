"""The planned steps inside slime. This module has the rollout function that returns a step's sequences, the schedule that replaces
slime's own, and the check on every trainer rank that it received what was planned.

slime's rollout manager calls `generate` (`--rollout-function-path`) before it schedules the result. During that call,
`build_dp_schedule` of the manager's module is replaced; nothing else of slime is. The trainers call `verify`
(`--rollout-data-postprocess-path`).
"""

import functools
import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from data_prep.pack.dataset import Dataset
from launch.run.run_plan import Plan, of_run
from launch.slime.job import RUN
from recipes.errors import TrainError
from recipes.layout import data_parallel
from recipes.schedule.schedule import Step

METHOD = "_split_train_data_by_dp"  # the method of slime's rollout manager that calls the schedule


@functools.cache
def run_plan() -> Plan:
    """Return the plan of this job, read from the run folder that the variable `job.RUN` names."""
    return of_run(Path(os.environ[RUN]))


def in_order(step: Step) -> list[int]:
    """Return the step's sequences in the order in which slime gets them: by rank, then by micro-batch."""
    return [s for rank in step.ranks for micro_batch in rank for s in micro_batch]


def generate(args: Any, rollout_id: int, data_buffer: Any, evaluation: bool = False) -> list[list[Any]]:
    """Return optimizer step `rollout_id` as slime's Samples, one per group.

    The rollout ids of a step cycle through as many values as there are data-parallel ranks. So slime treats the samples as one
    optimizer step, whatever their number.
    """
    from slime.utils.types import Sample

    bind(inspect.currentframe())
    planned_run = run_plan()
    dp = data_parallel(planned_run.recipe)
    samples = []
    for index, sequence in enumerate(in_order(planned_run.schedule.step(rollout_id))):
        tokens, mask = planned_run.data.tokens(sequence).tolist(), loss_mask(planned_run.data, sequence)
        sample = Sample(index=index, rollout_id=rollout_id * dp + index % dp, tokens=tokens)
        sample.response_length, sample.loss_mask = len(mask), mask
        sample.reward, sample.status = 0.0, Sample.Status.COMPLETED
        samples.append([sample])
    return samples


def loss_mask(data: Dataset, sequence: int) -> list[int]:
    """Return 0 or 1 for each token from the first supervised token on, which slime calls the response.

    Raise `TrainError` if no token is supervised, because slime would count one token nevertheless. Raise it also if the sequence's
    first token is supervised, because slime would use a prediction from the neighbouring sequence.
    """
    spans = data.spans(sequence)
    first = spans[0][0] if spans else 0
    if first == 0:
        what = "supervises its first token" if spans else "has no supervised token"
        raise TrainError(
            f"sequence {data.segments[sequence]} of {data.ids[sequence]} {what}", "it cannot be trained through slime"
        )
    mask = np.zeros(data.lengths[sequence] - first, dtype=int)
    for start, end in spans:
        mask[start - first : end - first] = 1
    return mask.tolist()


def bind(frame: FrameType | None) -> None:
    """Replace slime's schedule with the planned one, for the rollout manager on whose call stack `frame` is.

    Ray sends the manager's class by value. Its methods look up names in a copy of `slime.ray.rollout`'s globals, which can only be
    reached through the methods. Raise `TrainError` if slime's schedule does not have the expected parameters.
    """
    while frame is not None and not hasattr(frame.f_locals.get("self"), METHOD):
        frame = frame.f_back
    if frame is None:
        raise TrainError(
            f"no caller of the rollout function has {METHOD}: this slime is none of launch/cluster/image/pins.py"
        )
    names = inspect.unwrap(getattr(type(frame.f_locals["self"]), METHOD)).__globals__  # Ray wraps an actor's methods
    slime_schedule = names.get("build_dp_schedule")
    if slime_schedule is planned:
        return
    wanted = list(inspect.signature(planned).parameters)
    found = list(inspect.signature(slime_schedule).parameters) if callable(slime_schedule) else "nothing"
    if found != wanted:
        raise TrainError(
            f"slime's build_dp_schedule takes {found}, not {wanted}: this slime is none of launch/cluster/image/pins.py"
        )
    names["build_dp_schedule"] = planned


def planned(
    args: Any,
    train_parallel_config: dict[str, int],
    total_lengths: list[int],
    *,
    global_batch_size: int,
    rollout_indices: list[int],
) -> tuple[list[list[int]], list[list[list[int]]], list[int], list[int]]:
    """Return the planned schedule of a step, in place of slime's `build_dp_schedule`.

    The result has four parts: for each rank the indices of its samples; for each rank and micro-batch the positions in that list;
    the number of micro-batches per rank; and the global batch size in rollouts. Raise `TrainError` if slime's samples are not the
    planned ones.
    """
    planned_run = run_plan()
    dp = train_parallel_config["dp_size"]
    step = planned_run.schedule.step(min(rollout_indices) // dp)
    wanted = [planned_run.data.lengths[s] for s in in_order(step)]
    if len(step.ranks) != dp or total_lengths != wanted:
        raise TrainError(
            f"slime asks for {len(total_lengths)} sequences on {dp} ranks, but the plan has {len(wanted)} on {len(step.ranks)}, or "
            "other lengths"
        )
    partitions, micro_batches, start = [], [], 0
    for rank in step.ranks:
        size = sum(len(micro_batch) for micro_batch in rank)
        partitions.append(list(range(start, start + size)))
        micro_batches.append(places(rank))
        start += size
    return partitions, micro_batches, [len(step.ranks[0])], [global_batch_size]


def places(rank: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return consecutive numbers from 0 in the shape of a rank's micro-batches."""
    numbers = iter(range(sum(len(micro_batch) for micro_batch in rank)))
    return [[next(numbers) for _ in micro_batch] for micro_batch in rank]


def verify(args: Any, rollout_id: int, rollout_data: dict[str, Any]) -> None:
    """Check what a trainer received. Raise `TrainError` if its sequences, its micro-batches or its tokens are not the planned ones."""
    from megatron.core import parallel_state

    planned_run = run_plan()
    dp_rank = parallel_state.get_data_parallel_rank(with_context_parallel=False)
    rank = planned_run.schedule.step(rollout_id).ranks[dp_rank]
    sequences = [s for micro_batch in rank for s in micro_batch]
    lengths = [len(tokens) for tokens in rollout_data["tokens"]]
    wanted = [planned_run.data.lengths[s] for s in sequences]
    if rollout_data["micro_batch_indices"] != places(rank) or lengths != wanted:
        raise TrainError(
            f"step {rollout_id + 1}: this rank received sequences of {lengths} tokens, which is not what was planned"
        )
    for tokens, sequence in zip(rollout_data["tokens"], sequences, strict=True):
        if not np.array_equal(np.asarray(tokens), planned_run.data.tokens(sequence)):
            raise TrainError(
                f"step {rollout_id + 1}: the tokens of {planned_run.data.ids[sequence]} are not those of the data set"
            )
