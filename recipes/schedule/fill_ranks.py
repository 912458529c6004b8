"""The check that every step has enough sequences for all ranks, and the override that provides them."""

from collections.abc import Iterator
from dataclasses import replace

from recipes.config import Recipe
from recipes.errors import ConfigError
from recipes.layout import Changes, changed, completed, data_parallel, typed
from recipes.schedule.schedule import Schedule, schedule_of


def check_filled(r: Recipe, schedule: Schedule, option: str = "data.path") -> None:
    """Raise `ConfigError` if the sequences of a step cannot be spread over the ranks. Its fix is an override that was tried.

    schedule: the recipe's schedule on the data of `option`. option: data.path or data.heldout.
    """
    try:
        schedule.check()
    except ConfigError as error:
        raise ConfigError(error.problem, remedy(r, schedule, option)) from error


def remedy(r: Recipe, schedule: Schedule, option: str = "data.path") -> str:
    """Return the first override with which every step fills the ranks. If none does, return a request for more data."""
    if option == "data.path":
        for size in _batch_sizes(schedule):
            if _fills(replace(schedule, batch_size=size)):
                return f"write optim.batch_size={size}"
    for wish in _layouts(r):
        if (changes := completed(r, wish)) is not None:
            other = schedule_of(changed(r, changes), schedule.trajectory, schedule.lengths)
            fields = ("batch_size", "epochs", "copies", "sampling")  # held-out data has its own values of these
            if _fills(replace(other, **{name: getattr(schedule, name) for name in fields})):
                return f"write {typed(changes)}"
    return f"name a file with more trajectories as {option}" + (
        ", or write data.heldout=null" if option == "data.heldout" else ""
    )


def _batch_sizes(schedule: Schedule) -> Iterator[int]:
    """Yield larger batch sizes, each about twice the one before, up to all trajectories in one step."""
    most = len(set(schedule.trajectory)) * schedule.copies
    size = max(schedule.dp * schedule.micro_batch_multiple, schedule.batch_size + 1)
    while size < most:
        yield size
        size *= 2
    if most > schedule.batch_size:
        yield most


def _layouts(r: Recipe) -> Iterator[Changes]:
    """Yield changes to fewer micro-batches per rank or fewer data-parallel ranks. Changes that leave no GPU idle come first."""
    if r.layout.vpp > 1:
        yield {"layout.vpp": 1}
    for doublings in range(1, data_parallel(r).bit_length()):
        yield {"layout.cp": r.layout.cp * 2**doublings}
    name, count = ("nodes", r.cluster.nodes) if r.cluster.nodes > 1 else ("gpus_per_node", r.cluster.gpus_per_node)
    for fewer in range(count - 1, 0, -1):
        yield {f"cluster.{name}": fewer}


def _fills(schedule: Schedule) -> bool:
    """Return whether the sequences of every step can be spread over the ranks."""
    try:
        schedule.check()
    except ConfigError:
        return False
    return True
