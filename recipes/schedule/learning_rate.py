"""The learning rate of every step."""

import math

from recipes.config import Optim


def learning_rate(optim: Optim, step: int, num_steps: int) -> float:
    """Rate applied in `step` (from 0) of `num_steps`: linear over `warmup_steps`, its first step above zero, then a
    cosine that reaches lr x `min_lr_ratio` in the last step.

    With `warmup_fraction`, as Megatron's `OptimizerParamScheduler` counts it: the first step's rate is zero, and the last is
    a step short of the floor.
    """
    floor = optim.lr * optim.min_lr_ratio
    if optim.warmup_fraction is not None:
        warmup = optim.warmup_fraction * num_steps
        if step < warmup:
            return optim.lr * step / warmup
        return _cosine(optim.lr, floor, (step - warmup) / (num_steps - warmup))
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / (optim.warmup_steps + 1)
    span = max(1, num_steps - 1 - optim.warmup_steps)
    progress = min(1.0, (step - optim.warmup_steps) / span)
    return _cosine(optim.lr, floor, progress)


def _cosine(lr: float, floor: float, progress: float) -> float:
    return floor + (lr - floor) * (1 + math.cos(math.pi * progress)) / 2
