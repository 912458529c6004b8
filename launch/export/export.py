"""Export a checkpoint of slime or the embedded engine to a Hugging Face folder, on CPUs, without Megatron or process groups.

Only weights are read, a few parameters at a time. Each byte is read once and verified. The base gives the names and sizes of
the tensors, so the headers of the new files are written first and workers fill in the bytes. Peak memory per worker is about
its largest tensor, for any model size.
"""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from data_prep.files import sync_tree, whole_folder
from launch.export import export_worker
from launch.export.export_worker import Group, Piece
from launch.run.run_folder import RECORD, check_room, damage
from launch.weights import hf_folder, safetensors_file, tensor_work
from launch.weights.safetensors_folder import SafetensorsFolder
from launch.weights.torch_dist import TorchDist
from recipes.checkpoint.checkpoint_config import check_checkpoint
from recipes.checkpoint.tensors import is_mtp, links
from recipes.config import Model, Mtp, Recipe
from recipes.errors import CheckpointError, PreflightError
from recipes.families.common.parts import OUTPUT, Link

BATCH_BYTES = 128 << 20  # per task of a worker


def export_checkpoint(recipe: Recipe, checkpoint: Path, target: Path, console: Console) -> None:
    """Write the folder `target` atomically in the base's dtypes, replacing an earlier one. Print its size and the speed.

    checkpoint: `iter_NNNNNNN` of slime or `step_NNNNNN` of the embedded engine. Raise `CheckpointError` if it is damaged, lacks
    a tensor, or does not match the recipe's model and its base.
    """
    started = time.perf_counter()
    m = recipe.model
    check_checkpoint(m)
    if (checkpoint / RECORD).is_file() and (fault := damage(checkpoint)):
        raise CheckpointError(f"'{checkpoint}' is damaged ({fault})", "write step=N of another checkpoint")
    groups = planned(TorchDist(checkpoint), SafetensorsFolder(Path(m.checkpoint)), m)
    size = sum(g.size for g in groups)
    with _locked(target), whole_folder(target) as scratch:
        check_room(recipe, size)
        groups = _with_files(scratch, groups)
        weight_map = {p.name: p.file for g in groups for p in g.pieces}
        work = partial(export_worker.write_tensors, checkpoint, scratch, m)
        batches = list(tensor_work.cut(groups, BATCH_BYTES))
        for _ in tensor_work.each("Exporting", work, batches, export_worker.start, console):
            pass
        hf_folder.finish(scratch, weight_map, m, checkpoint.name)
        sync_tree(scratch)  # before the earlier export is removed
        if target.exists():
            target.rename(target.with_name(f".{target.name}.earlier"))
    shutil.rmtree(target.with_name(f".{target.name}.earlier"), ignore_errors=True)
    seconds = time.perf_counter() - started
    console.print(f"{target}: {size / 1e9:.3g} GB in {seconds:.1f} s, {size / 1e9 / seconds:.3g} GB/s")


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Lock the parent folder of `target` for one export. Remove the leftovers of a killed export to this target."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PreflightError(f"another export writes into '{target.parent}'", "wait for it to end") from error
        for leftover in target.parent.glob(f".{target.name}.*"):
            shutil.rmtree(leftover)
        yield
    finally:
        os.close(folder)


def planned(checkpoint: TorchDist, base: SafetensorsFolder, m: Model) -> list[Group]:
    """Return groups of all tensors to export, with the location of their trained values.

    Raise `CheckpointError` if the parameters of the checkpoint, or the tensors of the base, differ from the recipe's model.
    """
    table = links(m)
    if m.tied:
        del table["output_layer.weight"]
    wanted = {name for link in table.values() for name in link.hf}
    # Some bases with a tied output layer store it nevertheless.
    stored_output = {OUTPUT} & base.entries.keys() if m.tied else set()
    mtp = {name for name in base.entries if is_mtp(name, m)}
    if different := sorted((wanted | stored_output | mtp) ^ base.entries.keys()):
        raise CheckpointError(
            f"'{base.folder}' and the recipe's model differ in {_some(different)}",
            "write model.checkpoint=FOLDER of the run's base",
        )
    found = [(name, link, checkpoint.part(name, _shape(link, base), m)) for name, link in table.items()]
    if missing := [name for name, _, part in found if part is None]:
        raise CheckpointError(
            f"'{checkpoint.folder}' lacks {_some(missing)}: it is not a complete checkpoint of {m.name}"
        )
    if unknown := sorted(checkpoint.tensors.keys() - {part.key for _, _, part in found if part}):
        raise CheckpointError(
            f"'{checkpoint.folder}' holds {_some(unknown)}, which {m.name} does not have", "see model.*"
        )
    if stored_output:
        embedding = next(part for name, _, part in found if name == "embedding.word_embeddings.weight")
        found.append(("", Link({OUTPUT: base.entries[OUTPUT].shape}), embedding))
    if m.mtp is Mtp.copy:
        found += [("", Link({name: base.entries[name].shape}), None) for name in sorted(mtp)]
    return [
        Group(tuple(Piece(n, base.files[n], base.entries[n]) for n in link.hf), link, part) for _, link, part in found
    ]


def _shape(link: Link, base: SafetensorsFolder) -> tuple[int, ...]:
    """Return the shape of Megatron's parameter: the base's tensors stacked along axis 0."""
    shapes = [base.entries[name].shape for name in link.hf]
    return (sum(s[0] for s in shapes), *shapes[0][1:])


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


def _with_files(folder: Path, groups: list[Group]) -> list[Group]:
    """Create the files in group order, each about `hf_folder.FILE_BYTES` large. Return the groups with files and offsets."""
    files = list(tensor_work.cut(groups, hf_folder.FILE_BYTES))
    placed = []
    for number, file_groups in enumerate(files, 1):
        file = hf_folder.file_name(number, len(files))
        entries = safetensors_file.create(folder / file, {p.name: p.base for g in file_groups for p in g.pieces})
        for group in file_groups:
            pieces = tuple(replace(p, file=file, start=entries[p.name].start) for p in group.pieces)
            placed.append(replace(group, pieces=pieces))
    return placed
