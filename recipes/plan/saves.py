"""Checkpoints of a run: when they are written, their bytes, and the time it takes.

The last step's checkpoint holds weights alone, because nothing goes on from it.
"""

from dataclasses import dataclass

from recipes.config import Recipe, Save
from recipes.dimensions import parameters
from recipes.plan.partition import element_size

AT_LEAST = 4  # checkpoints of a run if engine.save_steps is null
AT_MOST_EVERY = 100  # steps between two of them then


@dataclass(frozen=True)
class Saves:
    """What a run writes to the disk. Sizes are in bytes; times are in seconds, and None if the disk's speed is not known."""

    interval: int  # steps between checkpoints
    count: int  # checkpoints of the whole run
    checkpoint: int  # one before the last step
    last: int  # the last step's
    export: int  # the Hugging Face folder, with the copied untrained layers
    kept: int  # at the end: the last engine.keep_last checkpoints and the export
    most: int  # at any time: one checkpoint more while it is being written
    seconds: float | None  # of one checkpoint
    all_seconds: float | None  # of all checkpoints and the export


def save_interval(r: Recipe, num_steps: int) -> int:
    """Return the steps between checkpoints: `engine.save_steps`, or as many as give `AT_LEAST` checkpoints."""
    return r.engine.save_steps or max(1, min(AT_MOST_EVERY, num_steps // AT_LEAST))


def saves_optimizer(r: Recipe, done: int, num_steps: int) -> bool:
    """Return whether the checkpoint after `done` steps is written with the optimizer state."""
    return r.engine.save is Save.full and done < num_steps


def saves(r: Recipe, num_steps: int) -> Saves:
    p, size = parameters(r.model), element_size(r)
    weights = p.total * size
    full = weights + 12 * p.total if r.engine.save is Save.full else weights  # fp32 weights and Adam's two moments
    export = (p.total + p.mtp) * size
    interval = save_interval(r, num_steps)
    count = -(-num_steps // interval)
    sizes = [full] * (count - 1) + [weights]
    kept = sum(sizes[-r.engine.keep_last :]) + export
    held = [sum(sizes[max(0, end - r.engine.keep_last - 1) : end]) for end in range(1, count + 1)]
    speed = r.cluster.disk_gb_s and r.cluster.disk_gb_s * 1e9
    return Saves(
        interval=interval,
        count=count,
        checkpoint=full,
        last=weights,
        export=export,
        kept=kept,
        most=max(*held, kept),
        seconds=full / speed if speed else None,
        all_seconds=(sum(sizes) + export) / speed if speed else None,
    )
