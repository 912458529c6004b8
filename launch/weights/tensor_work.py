"""Process many tensors in several processes, neighbours of a file together. A progress bar on a terminal counts bytes."""

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
    """Yield batches of consecutive items with up to `size` bytes each. A larger item gets a batch of its own."""
    batch_items: list[Item] = []
    total = 0
    for item in items:
        if batch_items and total + item.size > size:
            yield batch_items
            batch_items, total = [], 0
        batch_items.append(item)
        total += item.size
    if batch_items:
        yield batch_items


def each(
    title: str,
    work: Callable[[list[Item]], Result],
    batches: list[list[Item]],
    start: Callable[[], None],
    console: Console,
) -> Iterator[Result]:
    """Yield `work(batch)` for every batch, in order of completion.

    start: called once in each worker process; not called if this process does all the work. Raise `CheckpointError` if a
    worker is killed from outside.
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
                futures = {processes.submit(work, batch): size for batch, size in zip(batches, sizes, strict=True)}
                for future in as_completed(futures):
                    yield future.result()
                    bar.update(task, advance=futures[future])
        except BrokenProcessPool as error:
            raise CheckpointError(
                f"one of {workers} workers was killed from outside (out of memory?)",
                "free memory and run the same command again",
            ) from error


def _in_one_thread(work: Callable[[list[Item]], Result], batch: list[Item]) -> Result:
    """Run `work` with one torch thread, as a worker does, then restore this process's number of threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return work(batch)
    finally:
        torch.set_num_threads(threads)
