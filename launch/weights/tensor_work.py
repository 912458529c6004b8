"""Work on many tensors, neighbours together, by as many processes as there is work for; a bar of bytes on a terminal."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from data_prep.workers import pool
from recipes.errors import CheckpointError

MOST_WORKERS = 16


class Sized(Protocol):
    @property
    def size(self) -> int: ...  # bytes


Item = TypeVar("Item", bound=Sized)
Result = TypeVar("Result")


def cut(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Neighbours together, up to `size` bytes or one item."""
    held: list[Item] = []
    total = 0
    for item in items:
        if held and total + item.size > size:
            yield held
            held, total = [], 0
        held.append(item)
        total += item.size
    if held:
        yield held


def each(
    title: str,
    work: Callable[[list[Item]], Result],
    batches: list[list[Item]],
    start: Callable[[], None],
    console: Console,
) -> Iterator[Result]:
    """`work` of every batch, as they are done. start: called once in each process, where there is work for several.

    Raises `CheckpointError` where a process is ended from outside.
    """
    workers = min(len(os.sched_getaffinity(0)), MOST_WORKERS, len(batches))
    sizes = [sum(item.size for item in batch) for batch in batches]
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=sum(sizes))
        if workers <= 1:
            for batch, size in zip(batches, sizes, strict=True):
                yield _in_one_thread(work, batch)
                bar.update(task, advance=size)
            return
        try:
            with pool(workers, "torch", start) as processes:
                done = {processes.submit(work, batch): size for batch, size in zip(batches, sizes, strict=True)}
                for one in as_completed(done):
                    yield one.result()
                    bar.update(task, advance=done[one])
        except BrokenProcessPool as error:
            raise CheckpointError(
                f"one of {workers} workers was ended from outside (out of memory?)",
                "make room and run the same command again",
            ) from error


def _in_one_thread(work: Callable[[list[Item]], Result], batch: list[Item]) -> Result:
    """As a worker does; this process has a use of its own for its threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return work(batch)
    finally:
        torch.set_num_threads(threads)
