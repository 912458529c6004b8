"""The learning rate of every step."""

import math

from recipes.config import Optim


def learning_rate(optim: Optim, step: int, num_steps: int) -> float:
    """Return the learning rate of `step` (counted from 0) in a run of `num_steps`.

    The rate rises linearly over `warmup_steps`, starting above zero. Then it follows a cosine and reaches lr x `min_lr_ratio`
    in the last step. `warmup_fraction` overrides `warmup_steps` and counts as Megatron's `OptimizerParamScheduler` does: the
    first step's rate is zero, and the last step is one step before the minimum.
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
    """Return the rate of a cosine from `lr` at progress 0 to `floor` at progress 1."""
    return floor + (lr - floor) * (1 + math.cos(math.pi * progress)) / 2
