"""Read the weights of a torch_dist checkpoint part by part, without Megatron, process groups or the optimizer state.

Megatron's dist_checkpointing writes a tensor in pieces into `.distcp` files. Each piece is a record written by `torch.save`;
`.metadata` has the offsets. Names are those of `hf_names.py`, with these exceptions:

| in the model | in the checkpoint |
|---|---|
| `decoder.layers.3.REST` | the same, or row 3 of `decoder.layers.REST` if all layers are alike |
| `….mlp.experts.linear_fc1.weight7` | row 7 of `….mlp.experts.experts.linear_fc1.weight` |
| rows of the vocabulary | the same, followed by padding rows |

The gate and up projections are stacked, gate first, for every tensor parallelism of the writer.
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
    """A rectangular block of a tensor, and the record that contains it."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int  # of the record in the file, in bytes
    size: int  # of the record, in bytes


@dataclass(frozen=True)
class Stored:
    """A tensor stored in the checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Part:
    """A model parameter in a checkpoint."""

    key: str
    rows: tuple[int, ...]  # its layer and expert indices in the tensor `key`, if stacked
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]


class TorchDist:
    """The index of a checkpoint. Raise `CheckpointError` if it cannot be read or a file is shorter than it says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors = _tensors(folder)
        self._by_rows: dict[str, dict[tuple[int, ...], list[Piece]]] = {}
        ends: dict[str, int] = {}
        for piece in itertools.chain.from_iterable(t.pieces for t in self.tensors.values()):
            ends[piece.file] = max(ends.get(piece.file, 0), piece.offset + piece.size)
        for name, end in sorted(ends.items()):
            file_bytes = (folder / name).stat().st_size if (folder / name).is_file() else 0
            if file_bytes < end:
                raise CheckpointError(
                    f"'{folder / name}' has {file_bytes:,} bytes and its checkpoint's index names {end:,}: {_DAMAGED}"
                )

    def part(self, name: str, shape: tuple[int, ...], m: Model) -> Part | None:
        """Return the pieces of the parameter `name` of `tensors.links`; None if the checkpoint has no such parameter.

        shape: the full shape of the parameter. Raise `CheckpointError` if the stored shape differs or a piece is missing.
        """
        for key, rows, counts in _candidates(name, m):
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
                raise CheckpointError(f"'{self.folder}' holds {key} {[*rows]} in part only: {_DAMAGED}")
            return part
        return None

    def _rows(self, key: str, count: int) -> dict[tuple[int, ...], list[Piece]]:
        """Return the pieces of a tensor by their first `count` indices."""
        if key not in self._by_rows:
            found = self._by_rows[key] = {}
            for piece in self.tensors[key].pieces:
                spans = [range(a, a + n) for a, n in zip(piece.start[:count], piece.shape[:count], strict=True)]
                for rows in itertools.product(*spans):
                    found.setdefault(rows, []).append(piece)
        return self._by_rows[key]


def read_part(folder: Path, part: Part) -> Tensor:
    """Return a part's tensor. Raise `CheckpointError` if a record's bytes differ from those written."""
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
    """Return the slices of a part that a piece covers, without padding."""
    lead = len(part.rows)
    axes = zip(piece.start[lead:], piece.shape[lead:], part.shape, strict=True)
    return tuple(slice(a, min(a + n, end)) for a, n, end in axes)


def _candidates(name: str, m: Model) -> Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Yield (key, row indices, number of rows) for every key under which a parameter may be stored."""
    rows: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    if expert := re.fullmatch(r"(.*\.mlp\.experts)(\..*\.weight)(\d+)", name):
        name, rows, counts = f"{expert[1]}.experts{expert[2]}", (int(expert[3]),), (m.experts,)
    yield name, rows, counts
    if layer := re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name):
        yield f"decoder.layers.{layer[2]}", (int(layer[1]), *rows), (m.layers, *counts)


_DAMAGED = "it is damaged; copy it anew, or write step=N of another checkpoint"


_UNREADABLE = (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile)
_STORAGES = {torch.bfloat16: "BFloat16Storage", torch.float16: "HalfStorage", torch.float32: "FloatStorage"}


def _record(folder: Path, piece: Piece, part: Part) -> Tensor:
    """Return the tensor of one `torch.save` record. Verify its checksum, which `torch.load` does not do."""
    try:
        with (folder / piece.file).open("rb") as file:
            view: Any = _View(file, piece.offset, piece.size)
            tensor = torch.load(view, map_location="cpu", weights_only=True)
            fault = None
            if tuple(tensor.shape) != piece.shape or tensor.dtype != part.dtype:
                fault = f"it is {tensor.dtype} {[*tensor.shape]}"
            elif not _same_checksum(view, tensor):
                fault = "its checksum does not match its bytes"
    except _UNREADABLE as error:
        fault = str(error).partition("\n")[0]
    if fault:
        raise _not_written(part.key, folder, piece, fault)
    return tensor


def stream(folder: Path, key: str, piece: Piece, dtype: torch.dtype, elements: int) -> Iterator[Tensor]:
    """Yield the values of a piece of `key` in order as flat tensors of `elements` values. Only one chunk is in memory.

    Raise `CheckpointError` if the record differs from what was written, at the latest with the last chunk.
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
            if record.CRC == 0:  # no checksum was written; without this, zipfile would compare with 0
                del record.CRC
            with archive.open(record) as values:
                while content := values.read(elements * dtype.itemsize):
                    yield torch.frombuffer(bytearray(content), dtype=dtype)
    except (*_UNREADABLE, KeyError) as error:
        raise _not_written(key, folder, piece, str(error).partition("\n")[0]) from error


def _not_written(key: str, folder: Path, piece: Piece, fault: str) -> CheckpointError:
    where = f"byte {piece.offset:,} of '{folder / piece.file}'"
    return CheckpointError(f"{key} at {where} is not what was written ({fault}): {_DAMAGED}")


def _same_checksum(view: "_View", tensor: Tensor) -> bool:
    """Return whether a record's bytes have the CRC-32 written with them. A CRC-32 of 0 means that none was written."""
    with zipfile.ZipFile(view) as archive:
        written = next(i.CRC for i in archive.infolist() if i.filename.endswith("/data/0"))
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return written in (0, zlib.crc32(storage.numpy().data))


class _View(io.RawIOBase):
    """A read-only file object over a byte range of another file, without an extra copy."""

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


def holds_optimizer(folder: Path) -> bool:
    """Return whether a checkpoint holds an optimizer state. Raise `CheckpointError` if its index cannot be read."""
    return any("optimizer" in key.split(".") for key in _index(folder).state_dict_metadata)


def _index(folder: Path) -> Any:
    try:
        with (folder / ".metadata").open("rb") as file:
            return _Index(file).load()
    except Exception as error:  # a damaged pickle can raise any exception
        raise CheckpointError(f"'{folder / '.metadata'}' cannot be read ({error}): {_DAMAGED}") from error


def _tensors(folder: Path) -> dict[str, Stored]:
    """Return the model's tensors by key. Transformer Engine's `_extra_state` is no tensor and is skipped."""
    index = _index(folder)
    try:
        pieces: dict[str, list[Piece]] = {}
        sizes = {
            (key, tuple(chunk.offsets)): tuple(chunk.sizes)
            for key, stored in index.state_dict_metadata.items()
            if key.partition(".")[0] in _MODULES
            for chunk in getattr(stored, "chunks", ())
        }
        for entry, record in index.storage_data.items():
            start = tuple(getattr(entry, "offset", None) or ())  # the attribute is absent if it is null
            if (entry.fqn, start) in sizes:
                shape = sizes[entry.fqn, start]
                found = Piece(start, shape, record.relative_path, record.offset, record.length)
                pieces.setdefault(entry.fqn, []).append(found)
        described = index.state_dict_metadata
        return {
            k: Stored(tuple(described[k].size), described[k].properties.state[0], tuple(p)) for k, p in pieces.items()
        }
    except Exception as error:  # a damaged pickle can raise any exception
        raise CheckpointError(f"'{folder / '.metadata'}' cannot be read ({error}): {_DAMAGED}") from error


class _Index(pickle.Unpickler):
    """Unpickler of `.metadata`. It imports and calls no class of torch or Megatron; their objects become `_Plain`."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        return _Plain


class _Header(pickle.Unpickler):
    """Unpickler of a `torch.save` header. It returns the storage kind, the offset in the storage, the shape and the strides."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda kind, start, shape, strides, *_: (kind, start, shape, strides)
        return name if module == "torch" else _Plain

    def persistent_load(self, storage: Any) -> Any:
        return storage[1]


class _Plain:
    """The fields of an object of any class."""

    def __new__(cls, *_: Any) -> "_Plain":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})
