"""The work of an export's workers: read a few parameters of a checkpoint and write their tensors into the export's files.

This is a separate module because every worker imports it.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from launch.weights import hf_names, torch_dist
from launch.weights.dtypes import DTYPES
from launch.weights.safetensors_file import Entry
from launch.weights.torch_dist import Part
from recipes.config import Model
from recipes.errors import CheckpointError
from recipes.families.common.parts import Link


@dataclass(frozen=True)
class Piece:
    """A tensor of the export, and the base's tensor of the same name."""

    name: str
    base_file: str
    base: Entry
    file: str = ""
    start: int = 0  # offset of its bytes in `file`


@dataclass(frozen=True)
class Group:
    """The exported (Hugging Face) tensors that one Megatron parameter holds. part: the parameter in the checkpoint; None means that
    they are copied from the base."""

    pieces: tuple[Piece, ...]
    link: Link
    part: Part | None

    @property
    def size(self) -> int:
        return sum(p.base.size for p in self.pieces)


def start() -> None:
    """Configure torch in a worker process."""
    torch.set_num_threads(1)
    # A setting of torch, read at its first allocation. Huge pages halve the time of a read.
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"


def write_tensors(checkpoint: Path, folder: Path, m: Model, groups: list[Group]) -> None:
    """Write the tensors of some groups into their files."""
    for group in groups:
        for piece, content in zip(group.pieces, _contents(checkpoint, m, group), strict=True):
            with (folder / piece.file).open("r+b") as file:
                file.seek(piece.start)
                file.write(content)


def _contents(checkpoint: Path, m: Model, group: Group) -> Iterator[memoryview]:
    """Yield the bytes of each tensor of a group."""
    if group.part is None:
        yield from (_of_base(piece, m) for piece in group.pieces)
        return
    trained = torch_dist.read_part(checkpoint, group.part)
    if group.part.key.endswith("expert_bias"):
        (piece,) = group.pieces
        content = _of_base(piece, m)
        _check_bias(torch.frombuffer(content, dtype=_dtype(piece)), trained, piece.name)
        yield content
        return
    for piece, tensor in zip(group.pieces, hf_names.split(group.link, trained, m), strict=True):
        if tuple(tensor.shape) != piece.base.shape:
            raise CheckpointError(
                f"{piece.name}: {[*tensor.shape]} trained, {[*piece.base.shape]} in the base", "see model.*"
            )
        yield tensor.to(_dtype(piece)).contiguous().reshape(-1).view(torch.uint8).numpy().data


def _of_base(piece: Piece, m: Model) -> memoryview:
    content = bytearray(piece.base.size)
    with (Path(m.checkpoint) / piece.base_file).open("rb") as file:
        file.seek(piece.base.start)
        file.readinto(content)
    return memoryview(content)


def _check_bias(base: Tensor, trained: Tensor, name: str) -> None:
    """Raise `CheckpointError` if the trained expert bias differs from the base's by more than bf16 rounding.

    The router's expert bias is frozen in training, and the base's bits are exported.
    """
    off = (trained.float() - base.float()).abs()
    if not bool((off <= base.float().abs() * 2**-8).all()):
        raise CheckpointError(
            f"{name} is frozen in training, but its values in the checkpoint differ from the base's by up to {off.max().item():.1e}",
            "write model.checkpoint=FOLDER of the run's base",
        )


def _dtype(piece: Piece) -> torch.dtype:
    if piece.base.dtype not in DTYPES:
        raise CheckpointError(
            f"{piece.name} is {piece.base.dtype} in the base, and an export is {', '.join(DTYPES)}",
            "write model.checkpoint=FOLDER of an unquantized base",
        )
    return DTYPES[piece.base.dtype]
