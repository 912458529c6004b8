"""Stands in for the module of slime's rollout manager, as the process has it that Ray sent the class to: a class with names of its
own, and wrapped methods."""

import functools
from collections.abc import Callable
from typing import Any

from launch.slime.hooks import rollout


def build_dp_schedule(
    args: Any, train_parallel_config: Any, total_lengths: Any, *, global_batch_size: Any, rollout_indices: Any
) -> Any:
    raise AssertionError("slime's own schedule ran")


def wrapped(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def within(*arguments: Any) -> Any:
        return method(*arguments)

    return within


class Manager:
    def generate(self, number: int) -> list[Any]:
        return [sample for group in rollout.generate(None, number, None) for sample in group]

    @wrapped
    def _split_train_data_by_dp(self, dp: int, samples: list[Any]) -> Any:
        return build_dp_schedule(
            None,
            {"dp_size": dp},
            [len(s.tokens) for s in samples],
            global_batch_size=dp,
            rollout_indices=[s.rollout_id for s in samples],
        )
