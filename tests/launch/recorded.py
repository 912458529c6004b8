"""A checkpoint written anew as slime's are: with checksums in its records, without a record of its files, or with other contents."""

import io
import itertools
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import torch


def rewritten(
    source: Path, target: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None] = lambda _, t: t
) -> Path:
    """The tensors of `source` in one new file, each as `change(key, tensor)` says, left out where it says None."""
    with (source / ".metadata").open("rb") as file:
        index = pickle.load(file)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    stored = {}
    with (target / "__0_0.distcp").open("wb") as file:
        for place, record in index.storage_data.items():
            with (source / record.relative_path).open("rb") as old:
                old.seek(record.offset)
                content = old.read(record.length)
            if place.offset is not None:
                tensor = change(place.fqn, torch.load(io.BytesIO(content)))
                if tensor is None:
                    continue
                content = saved(tensor)
            record.relative_path, record.offset, record.length = "__0_0.distcp", file.tell(), len(content)
            stored[place] = record
            file.write(content)
    index.storage_data = stored
    (target / ".metadata").write_bytes(pickle.dumps(index))
    return target


def saved(tensor: torch.Tensor) -> bytes:
    """A record with its checksum."""
    torch.serialization.set_crc32_options(True)  # the embedded engine's processes do without
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


def records(checkpoint: Path, weights: bool) -> list[tuple[Path, int, int]]:
    """File, offset and length of the records that hold weights, or of all others."""
    with (checkpoint / ".metadata").open("rb") as file:
        index = pickle.load(file)
    return [
        (checkpoint / r.relative_path, r.offset, r.length)
        for place, r in index.storage_data.items()
        if place.fqn.startswith(("decoder.", "embedding.", "output_layer.")) == weights
    ]


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def stacked(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A checkpoint of whole tensors, each row of those of all layers a record of its own, as Megatron writes them."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    folder.mkdir(parents=True)
    described, stored = {}, {}
    files = [(folder / f"__{i}_0.distcp").open("wb") for i in range(4)]
    for (key, whole), file in zip(tensors.items(), itertools.cycle(files)):
        rows = range(len(whole)) if key.startswith("decoder.layers.") else (slice(None),)
        chunks = []
        for row in rows:
            part = whole[row : row + 1] if isinstance(row, int) else whole
            start = torch.Size([row if isinstance(row, int) else 0, *[0] * (whole.dim() - 1)])
            content = saved(part.clone())
            stored[MetadataIndex(key, start)] = _StorageInfo(Path(file.name).name, file.tell(), len(content))
            chunks.append(ChunkStorageMetadata(start, part.shape))
            file.write(content)
        described[key] = TensorStorageMetadata(TensorProperties(whole.dtype), whole.shape, chunks)
    for file in files:
        file.close()
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(described, storage_data=stored)))
