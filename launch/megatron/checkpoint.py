"""One rank's part in torch_dist checkpoints: model, optimizer and step, written and read by Megatron's dist_checkpointing.

All ranks call `save` and `load` together. `run_folder.py` decides which checkpoints exist and when one becomes visible.
"""

import queue
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

from launch.megatron import optimizer_state


def save(folder: Path, chunks: list[Any], optimizer: Any, step: int) -> None:
    """Write the state after `step` completed steps into an existing, empty folder. optimizer: None writes weights alone."""
    # All ranks of this group hold the same weights; each writes a share of them.
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    shared = FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy(), group)
    dist_checkpointing.save(_state(chunks, optimizer, step, is_loading=False), str(folder), shared)


def load(folder: Path, chunks: list[Any], optimizer: Any) -> int:
    """Set the model and the optimizer from a checkpoint of any layout. Return its number of completed steps."""
    state = dist_checkpointing.load(_state(chunks, optimizer, 0, is_loading=True), str(folder))
    for name, chunk in _named(chunks):
        chunk.load_state_dict(state[name])
    optimizer_state.put(optimizer, state, state["step"])
    return int(state["step"])


def _state(chunks: list[Any], optimizer: Any, step: int, *, is_loading: bool) -> dict[str, Any]:
    # Megatron distinguishes replicas by their rank in this group.
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    model = {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in _named(chunks)}
    state = {} if optimizer is None else optimizer_state.sharded(optimizer, model, is_loading=is_loading)
    return {**model, **state, "step": step}


def _named(chunks: list[Any]) -> list[tuple[str, Any]]:
    return [("model" if len(chunks) == 1 else f"model{i}", chunk) for i, chunk in enumerate(chunks)]


# Workarounds for megatron-core 0.16.1 without Transformer Engine and Apex, applied once per process.


def _write_in_this_process() -> None:
    """Make Megatron write its buckets in threads of this process.

    Its own writer forks a process per file, and spawns a manager that re-imports the main module. That takes seconds per save, and
    forking while gloo runs is not safe.
    """
    writer = filesystem_async.FileSystemWriterAsync

    def write_one(transforms: Any, number: int, bucket: Any) -> Any:
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        count: queue.Queue[int] = queue.Queue()
        count.put(number)
        writer.write_preloaded_data(transforms, number, bucket, done, count, False)  # run_folder.py syncs all files
        return done.get()[1]

    def write(transforms: Any, use_msc: bool, rank: int, buckets: list[Any], results: Any) -> None:
        with ThreadPoolExecutor(len(buckets)) as pool:
            written = list(pool.map(partial(write_one, transforms), range(len(buckets)), buckets))
        failed = [r for r in written if isinstance(r, Exception)]
        results.put(failed[0] if failed else dict(enumerate(written)))

    results: queue.Queue[Any] = queue.Queue()
    writer.write_preloaded_data_multiproc = staticmethod(write)
    filesystem_async._get_write_results_queue = lambda: results


torch.serialization.set_crc32_options(False)  # redundant: every file has a SHA-256
_write_in_this_process()
