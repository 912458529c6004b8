"""The planned steps, inside slime: its rollout function, which gives a step's sequences, the schedule that takes the place of
slime's own, and the check on every trainer rank that what came is what was planned.

slime calls `generate` by `--rollout-function-path` in its rollout manager, before it schedules what it got: there the manager's
`build_dp_schedule` is rebound, the only thing of slime's that is. `verify` runs by `--rollout-data-postprocess-path` on the trainers.
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

METHOD = "_split_train_data_by_dp"  # of slime's rollout manager: asks for a schedule


@functools.cache
def plan() -> Plan:
    """What this job trains, from the run folder that `job.RUN` names."""
    return of_run(Path(os.environ[RUN]))


def in_order(step: Step) -> list[int]:
    """The step's sequences in the order in which slime gets them: rank after rank, micro-batch after micro-batch."""
    return [s for rank in step.ranks for micro_batch in rank for s in micro_batch]


def generate(args: Any, rollout_id: int, data_buffer: Any, evaluation: bool = False) -> list[list[Any]]:
    """Optimizer step `rollout_id` as slime's Samples, one a group. Their rollout ids count up to the number of data-parallel
    ranks, over and over: slime then takes a step of any size for one step."""
    from slime.utils.types import Sample

    bind(inspect.currentframe())
    here = plan()
    dp = data_parallel(here.recipe)
    samples = []
    for place, sequence in enumerate(in_order(here.schedule.step(rollout_id))):
        tokens, mask = here.data.tokens(sequence).tolist(), loss_mask(here.data, sequence)
        sample = Sample(index=place, rollout_id=rollout_id * dp + place % dp, tokens=tokens)
        sample.response_length, sample.loss_mask = len(mask), mask
        sample.reward, sample.status = 0.0, Sample.Status.COMPLETED
        samples.append([sample])
    return samples


def loss_mask(data: Dataset, sequence: int) -> list[int]:
    """0 or 1 for each token from the first supervised one on: slime's response.

    Raises `TrainError` where there is none, for which slime would count one token all the same, or where the first token is
    supervised, for which it would take a neighbour's prediction.
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
    """Puts the planned schedule in the place of slime's own, for the rollout manager on whose stack `frame` lies.

    Ray sends the manager's class by value: its methods look names up in a copy of `slime.ray.rollout`'s, which only they know.

    Raises `TrainError` where slime's schedule is not the one known here.
    """
    while frame is not None and not hasattr(frame.f_locals.get("self"), METHOD):
        frame = frame.f_back
    if frame is None:
        raise TrainError(f"nobody who called for a rollout has {METHOD}: this slime is not the pinned one")
    names = inspect.unwrap(getattr(type(frame.f_locals["self"]), METHOD)).__globals__  # Ray wraps an actor's methods
    theirs = names.get("build_dp_schedule")
    if theirs is planned:
        return
    wanted = list(inspect.signature(planned).parameters)
    found = list(inspect.signature(theirs).parameters) if callable(theirs) else "nothing"
    if found != wanted:
        raise TrainError(f"slime's build_dp_schedule takes {found}, not {wanted}: this slime is not the pinned one")
    names["build_dp_schedule"] = planned


def planned(
    args: Any,
    train_parallel_config: dict[str, int],
    total_lengths: list[int],
    *,
    global_batch_size: int,
    rollout_indices: list[int],
) -> tuple[list[list[int]], list[list[list[int]]], list[int], list[int]]:
    """As slime's: positions of the samples by rank, by rank and micro-batch the places in that, micro-batches a rank, rollouts."""
    here = plan()
    dp = train_parallel_config["dp_size"]
    step = here.schedule.step(min(rollout_indices) // dp)
    wanted = [here.data.lengths[s] for s in in_order(step)]
    if len(step.ranks) != dp or total_lengths != wanted:
        raise TrainError(
            f"slime asks for {len(total_lengths)} sequences over {dp} ranks, planned are {len(wanted)} over {len(step.ranks)}"
        )
    partitions, micro_batches, start = [], [], 0
    for rank in step.ranks:
        size = sum(len(micro_batch) for micro_batch in rank)
        partitions.append(list(range(start, start + size)))
        micro_batches.append(places(rank))
        start += size
    return partitions, micro_batches, [len(step.ranks[0])], [global_batch_size]


def places(rank: Sequence[Sequence[int]]) -> list[list[int]]:
    """Consecutive numbers in the shape of a rank's micro-batches."""
    numbers = iter(range(sum(len(micro_batch) for micro_batch in rank)))
    return [[next(numbers) for _ in micro_batch] for micro_batch in rank]


def verify(args: Any, rollout_id: int, rollout_data: dict[str, Any]) -> None:
    """On a trainer: raises `TrainError` where its sequences, their micro-batches or their tokens are not the plan's."""
    from megatron.core import parallel_state

    here = plan()
    rank = here.schedule.step(rollout_id).ranks[parallel_state.get_data_parallel_rank(with_context_parallel=False)]
    sequences = [s for micro_batch in rank for s in micro_batch]
    got = [len(tokens) for tokens in rollout_data["tokens"]]
    if rollout_data["micro_batch_indices"] != places(rank) or got != [here.data.lengths[s] for s in sequences]:
        raise TrainError(
            f"step {rollout_id + 1}: this rank got sequences of {got} tokens, which is not what was planned"
        )
    for tokens, sequence in zip(rollout_data["tokens"], sequences, strict=True):
        if not np.array_equal(np.asarray(tokens), here.data.tokens(sequence)):
            raise TrainError(
                f"step {rollout_id + 1}: the tokens of {here.data.ids[sequence]} are not those of the data set"
            )
