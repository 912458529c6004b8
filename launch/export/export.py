"""The Hugging Face folder of a checkpoint that slime or the embedded engine wrote, in ordinary processes on a CPU: no Megatron, no
process groups.

Only weights are read, each byte once and checked, a few parameters at a time: workers put them into files whose headers, names and
sizes are known from the base. So memory is that of the largest tensor a worker, whatever the model's size.
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

BATCH_BYTES = 128 << 20  # a worker's task


def export_checkpoint(recipe: Recipe, checkpoint: Path, target: Path, console: Console) -> None:
    """Writes the folder `target` whole, in the base's dtypes, in place of an earlier one; says how large and how fast.

    checkpoint: `iter_NNNNNNN` of slime or `step_NNNNNN` of the embedded engine. Raises `CheckpointError` where it is damaged, lacks
    a tensor, or is of another model than the recipe's and its base.
    """
    started = time.perf_counter()
    m = recipe.model
    check_checkpoint(m)
    if (checkpoint / RECORD).is_file() and (fault := damage(checkpoint)):
        raise CheckpointError(f"'{checkpoint}' is damaged ({fault})", "write step=N of another checkpoint")
    groups = planned(TorchDist(checkpoint), SafetensorsFolder(Path(m.checkpoint)), m)
    size = sum(g.size for g in groups)
    with _alone(target), whole_folder(target) as scratch:
        check_room(recipe, size)
        groups = _placed(scratch, groups)
        weight_map = {p.name: p.file for g in groups for p in g.pieces}
        work = partial(export_worker.write, checkpoint, scratch, m)
        batches = list(tensor_work.cut(groups, BATCH_BYTES))
        for _ in tensor_work.each("Exporting", work, batches, export_worker.start, console):
            pass
        hf_folder.finish(scratch, weight_map, m, checkpoint.name)
        sync_tree(scratch)  # before the earlier one goes
        if target.exists():
            target.rename(target.with_name(f".{target.name}.earlier"))
    shutil.rmtree(target.with_name(f".{target.name}.earlier"), ignore_errors=True)
    seconds = time.perf_counter() - started
    console.print(f"{target}: {size / 1e9:.3g} GB in {seconds:.1f} s, {size / 1e9 / seconds:.3g} GB/s")


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Holds the folder of `target` for one export, and removes what one that was killed left of this target."""
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
    """Every tensor of the base with where its trained values are.

    Raises `CheckpointError` where the checkpoint has not exactly the recipe's parameters, or the base not exactly its tensors.
    """
    table = links(m)
    if m.tied:
        del table["output_layer.weight"]
    wanted = {name for link in table.values() for name in link.hf}
    # Some bases with a tied output layer have it all the same.
    again = {OUTPUT} & base.entries.keys() if m.tied else set()
    mtp = {name for name in base.entries if is_mtp(name, m)}
    if differing := sorted((wanted | again | mtp) ^ base.entries.keys()):
        raise CheckpointError(
            f"'{base.folder}' and the recipe's model differ in {_some(differing)}",
            "write model.checkpoint=FOLDER of the run's base",
        )
    found = [(name, link, checkpoint.part(name, _shape(link, base), m)) for name, link in table.items()]
    if missing := [name for name, _, part in found if part is None]:
        raise CheckpointError(f"'{checkpoint.folder}' lacks {_some(missing)}: it is no whole checkpoint of {m.name}")
    if unknown := sorted(checkpoint.tensors.keys() - {part.key for _, _, part in found if part}):
        raise CheckpointError(f"'{checkpoint.folder}' holds {_some(unknown)}, which {m.name} has not", "see model.*")
    if again:
        embedding = next(part for name, _, part in found if name == "embedding.word_embeddings.weight")
        found.append(("", Link({OUTPUT: base.entries[OUTPUT].shape}), embedding))
    if m.mtp is Mtp.copy:
        found += [("", Link({name: base.entries[name].shape}), None) for name in sorted(mtp)]
    return [
        Group(tuple(Piece(n, base.files[n], base.entries[n]) for n in link.hf), link, part) for _, link, part in found
    ]


def _shape(link: Link, base: SafetensorsFolder) -> tuple[int, ...]:
    """Of Megatron's parameter: the base's tensors one over the other."""
    shapes = [base.entries[name].shape for name in link.hf]
    return (sum(s[0] for s in shapes), *shapes[0][1:])


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


def _placed(folder: Path, groups: list[Group]) -> list[Group]:
    """Makes the files, in the groups' order and about `hf_folder.FILE_BYTES` large, and gives every tensor its place."""
    files = list(tensor_work.cut(groups, hf_folder.FILE_BYTES))
    placed = []
    for number, held in enumerate(files, 1):
        file = hf_folder.file_name(number, len(files))
        places = safetensors_file.create(folder / file, {p.name: p.base for g in held for p in g.pieces})
        for group in held:
            pieces = tuple(replace(p, file=file, start=places[p.name].start) for p in group.pieces)
            placed.append(replace(group, pieces=pieces))
    return placed
