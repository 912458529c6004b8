"""The weights in a torch_dist checkpoint, read part by part without Megatron, process groups or the optimizer's state.

Megatron's dist_checkpointing writes a tensor in pieces, each a record that `torch.save` wrote, into `.distcp` files; `.metadata`
says where. Names are those of `hf_names.py`, but for:

| in the model | in the checkpoint |
|---|---|
| `decoder.layers.3.REST` | the same, or row 3 of `decoder.layers.REST` where all layers are alike |
| `….mlp.experts.linear_fc1.weight7` | row 7 of `….mlp.experts.experts.linear_fc1.weight` |
| rows of the vocabulary | the same, and after them rows that pad it |

A gate and its up projection lie one over the other, whatever the tensor parallelism that wrote them.
"""

import io
import itertools
import math
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from recipes.config import Model
from recipes.errors import CheckpointError

_MODULES = ("embedding", "decoder", "output_layer", "mtp")  # of Megatron's GPTModel
_PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True)
class Piece:
    """A box of a tensor, and the record that holds it."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int  # of the record, in bytes
    size: int


@dataclass(frozen=True)
class Stored:
    """A tensor of the checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Part:
    """A parameter of the model in a checkpoint."""

    key: str
    rows: tuple[int, ...]  # its layer and expert in `key`, where it has them
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]


class TorchDist:
    """A checkpoint's index. Raises `CheckpointError` where it cannot be read, or a file is shorter than it says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors = _tensors(folder)
        self._by_rows: dict[str, dict[tuple[int, ...], list[Piece]]] = {}
        ends: dict[str, int] = {}
        for piece in itertools.chain.from_iterable(t.pieces for t in self.tensors.values()):
            ends[piece.file] = max(ends.get(piece.file, 0), piece.offset + piece.size)
        for name, end in sorted(ends.items()):
            there = (folder / name).stat().st_size if (folder / name).is_file() else 0
            if there < end:
                raise CheckpointError(
                    f"'{folder / name}' has {there:,} bytes and its checkpoint's index names {end:,}: {_ANOTHER}"
                )

    def part(self, name: str, shape: tuple[int, ...], m: Model) -> Part | None:
        """Where the parameter `name` of `tensors.links` lies, whole, in this shape; None where the checkpoint has none of that name.

        Raises `CheckpointError` where it has another shape, or a piece is missing.
        """
        for key, rows, counts in _places(name, m):
            if (stored := self.tensors.get(key)) is None:
                continue
            wanted = (*counts, *shape)
            padded = len(wanted) == len(stored.shape) and name in _PADDED and stored.shape[0] > wanted[0]
            if stored.shape != wanted and not (padded and stored.shape[1:] == wanted[1:]):
                raise CheckpointError(
                    f"{key} has the shape {[*stored.shape]} in '{self.folder}', and the recipe's model {[*wanted]}: it is the "
                    "checkpoint of another model",
                    "write the model.* that it was trained with",
                )
            pieces = [p for p in self._rows(key, len(rows)).get(rows, ()) if not padded or p.start[0] < shape[0]]
            part = Part(key, rows, shape, stored.dtype, tuple(pieces))
            if sum(math.prod(s.stop - s.start for s in _box(part, p)) for p in pieces) != math.prod(shape):
                raise CheckpointError(f"'{self.folder}' holds {key} {[*rows]} in part only: {_ANOTHER}")
            return part
        return None

    def _rows(self, key: str, count: int) -> dict[tuple[int, ...], list[Piece]]:
        """The pieces of a tensor by their first `count` indices."""
        if key not in self._by_rows:
            found = self._by_rows[key] = {}
            for piece in self.tensors[key].pieces:
                spans = [range(a, a + n) for a, n in zip(piece.start[:count], piece.shape[:count], strict=True)]
                for rows in itertools.product(*spans):
                    found.setdefault(rows, []).append(piece)
        return self._by_rows[key]


def read(folder: Path, part: Part) -> Tensor:
    """A part's tensor. Raises `CheckpointError` where a record's bytes are not those that were written."""
    whole: Tensor | None = None
    for piece in part.pieces:
        tensor = _record(folder, piece, part)
        for row, start in zip(part.rows, piece.start, strict=False):
            tensor = tensor[row - start]
        box = _box(part, piece)
        tensor = tensor[tuple(slice(0, s.stop - s.start) for s in box)]
        if tensor.shape == part.shape:
            return tensor
        if whole is None:
            whole = torch.empty(part.shape, dtype=part.dtype)
        whole[box] = tensor
    assert whole is not None, "a part has pieces"
    return whole


def _box(part: Part, piece: Piece) -> tuple[slice, ...]:
    """What of a part a piece holds, the padding left out."""
    lead = len(part.rows)
    place = zip(piece.start[lead:], piece.shape[lead:], part.shape, strict=True)
    return tuple(slice(a, min(a + n, end)) for a, n, end in place)


def _places(name: str, m: Model) -> Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Keys under which a parameter may be: with the rows that it is there, and how many there are of these."""
    rows: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    if expert := re.fullmatch(r"(.*\.mlp\.experts)(\..*\.weight)(\d+)", name):
        name, rows, counts = f"{expert[1]}.experts{expert[2]}", (int(expert[3]),), (m.experts,)
    yield name, rows, counts
    if layer := re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name):
        yield f"decoder.layers.{layer[2]}", (int(layer[1]), *rows), (m.layers, *counts)


_ANOTHER = "it is damaged; copy it anew, or write step=N of another checkpoint"


_UNREADABLE = (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile)
_STORAGES = {torch.bfloat16: "BFloat16Storage", torch.float16: "HalfStorage", torch.float32: "FloatStorage"}


def _record(folder: Path, piece: Piece, part: Part) -> Tensor:
    """The tensor that one `torch.save` wrote, its checksum compared: `torch.load` does not."""
    try:
        with (folder / piece.file).open("rb") as file:
            view: Any = _View(file, piece.offset, piece.size)
            tensor = torch.load(view, map_location="cpu", weights_only=True)
            fault = None
            if tuple(tensor.shape) != piece.shape or tensor.dtype != part.dtype:
                fault = f"it is {tensor.dtype} {[*tensor.shape]}"
            elif not _same_checksum(view, tensor):
                fault = "its checksum is not its bytes'"
    except _UNREADABLE as error:
        fault = str(error).partition("\n")[0]
    if fault:
        raise _not_written(part.key, folder, piece, fault)
    return tensor


def stream(folder: Path, key: str, piece: Piece, dtype: torch.dtype, elements: int) -> Iterator[Tensor]:
    """The values of a piece of `key` in order, flat, so many elements at a time: memory is that of these alone.

    Raises `CheckpointError` where its record is not what was written, at the latest with the last of them.
    """
    try:
        with (
            (folder / piece.file).open("rb") as file,
            zipfile.ZipFile(_View(file, piece.offset, piece.size)) as archive,
        ):
            names = {name.partition("/")[2]: name for name in archive.namelist()}
            kind, start, shape, strides = _Header(archive.open(names["data.pkl"])).load()
            in_order = all(
                count == 1 or step == math.prod(shape[n + 1 :])
                for n, (count, step) in enumerate(zip(shape, strides, strict=True))
            )
            if (kind, start, shape, in_order) != (_STORAGES.get(dtype), 0, piece.shape, True):
                raise ValueError(f"it is {kind} {[*shape]} from {start} by {[*strides]}")
            record = archive.getinfo(names["data/0"])
            if record.file_size != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"it has {record.file_size:,} bytes")
            if record.CRC == 0:  # none was written, and zipfile compares what there is
                del record.CRC
            with archive.open(record) as values:
                while content := values.read(elements * dtype.itemsize):
                    yield torch.frombuffer(bytearray(content), dtype=dtype)
    except (*_UNREADABLE, KeyError) as error:
        raise _not_written(key, folder, piece, str(error).partition("\n")[0]) from error


def _not_written(key: str, folder: Path, piece: Piece, fault: str) -> CheckpointError:
    where = f"byte {piece.offset:,} of '{folder / piece.file}'"
    return CheckpointError(f"{key} at {where} is not what was written ({fault}): {_ANOTHER}")


def _same_checksum(view: "_View", tensor: Tensor) -> bool:
    """Whether a record's bytes have the CRC-32 that was written with them; 0 where none was."""
    with zipfile.ZipFile(view) as archive:
        written = next(i.CRC for i in archive.infolist() if i.filename.endswith("/data/0"))
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return written in (0, zlib.crc32(storage.numpy().data))


class _View(io.RawIOBase):
    """A span of a file as a file of its own, read straight into the reader's memory."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        count = self._file.readinto(memoryview(buffer)[: max(0, self._size - self._at)])  # type: ignore[attr-defined]
        self._at += count
        return count


def _tensors(folder: Path) -> dict[str, Stored]:
    """The model's tensors by key; Transformer Engine's `_extra_state` is no tensor."""
    try:
        with (folder / ".metadata").open("rb") as file:
            index = _Index(file).load()
        pieces: dict[str, list[Piece]] = {}
        sizes = {
            (key, tuple(chunk.offsets)): tuple(chunk.sizes)
            for key, stored in index.state_dict_metadata.items()
            if key.partition(".")[0] in _MODULES
            for chunk in getattr(stored, "chunks", ())
        }
        for place, record in index.storage_data.items():
            start = tuple(getattr(place, "offset", None) or ())  # left out where it is null
            if (place.fqn, start) in sizes:
                shape = sizes[place.fqn, start]
                found = Piece(start, shape, record.relative_path, record.offset, record.length)
                pieces.setdefault(place.fqn, []).append(found)
        described = index.state_dict_metadata
        return {
            k: Stored(tuple(described[k].size), described[k].properties.state[0], tuple(p)) for k, p in pieces.items()
        }
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"'{folder / '.metadata'}' cannot be read ({error}): {_ANOTHER}") from error


class _Index(pickle.Unpickler):
    """`.metadata` names classes of torch's, and of Megatron's: none is imported or called, their objects become plain ones."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        return _Plain


class _Header(pickle.Unpickler):
    """What `torch.save` wrote of a tensor beside its values: the kind of its storage, its place there, shape and strides."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda kind, start, shape, strides, *_: (kind, start, shape, strides)
        return name if module == "torch" else _Plain

    def persistent_load(self, storage: Any) -> Any:
        return storage[1]


class _Plain:
    """The fields of an object, whatever its class was."""

    def __new__(cls, *_: Any) -> "_Plain":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})
