"""A checkpoint written anew as slime's are: with checksums in its records, without a record of its files, or with other contents."""

import io
import itertools
import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from launch.weights import safetensors_file, tiny
from recipes.checkpoint.tensors import trained
from recipes.config import Model
from recipes.families import facts


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


def flip(checkpoint: Path) -> None:
    """Changes a bit of the largest weight."""
    path, offset, size = max(records(checkpoint, weights=True), key=lambda record: record[2])
    with path.open("rb") as file:
        file.seek(offset + size // 2)
        byte = file.read(1)
    overwrite(path, offset + size // 2, bytes([byte[0] ^ 1]))


def cut(checkpoint: Path) -> None:
    """Cuts a file off inside its last weight."""
    path, offset, _ = max(records(checkpoint, weights=True))
    with path.open("r+b") as file:
        file.truncate(offset + 100)


def dense(m: Model, folder: Path) -> Path:
    """A checkpoint of a dense model with random bf16 weights as Megatron writes it: each layer's row of a tensor a record, a gate and
    its up projection two."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    folder.mkdir(parents=True)
    described: dict[str, Any] = {}
    stored: dict[MetadataIndex, Any] = {}
    with (folder / "__0_0.distcp").open("wb") as file:
        for key, shape in _dense_shapes(m).items():
            first = range(shape[0]) if key.startswith("decoder.layers.") else (0,)
            second = (0, shape[1] // 2) if key.endswith("linear_fc1.weight") else (0,)
            chunks = []
            for place in itertools.product(first, second):
                start = torch.Size([*place, *[0] * len(shape)][: len(shape)])
                whole = (shape[0] // len(first), *shape[1:])
                part = torch.randn(whole).chunk(len(second), -2 if len(second) > 1 else -1)[0]
                content = saved(part.bfloat16().clone())
                stored[MetadataIndex(key, start)] = _StorageInfo("__0_0.distcp", file.tell(), len(content))
                chunks.append(ChunkStorageMetadata(start, part.shape))
                file.write(content)
            described[key] = TensorStorageMetadata(TensorProperties(torch.bfloat16), torch.Size(shape), chunks)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(described, storage_data=stored)))
    return folder


def _dense_shapes(m: Model) -> dict[str, tuple[int, ...]]:
    layer = {
        "self_attention.linear_qkv.weight": ((m.heads + 2 * m.kv_heads) * m.head_dim, m.hidden),
        "self_attention.linear_qkv.layer_norm_weight": (m.hidden,),
        "self_attention.linear_proj.weight": (m.hidden, m.heads * m.head_dim),
        "self_attention.q_layernorm.weight": (m.head_dim,),
        "self_attention.k_layernorm.weight": (m.head_dim,),
        "mlp.linear_fc1.weight": (2 * m.ffn, m.hidden),
        "mlp.linear_fc1.layer_norm_weight": (m.hidden,),
        "mlp.linear_fc2.weight": (m.hidden, m.ffn),
    }
    stack = {f"decoder.layers.{name}": (m.layers, *shape) for name, shape in layer.items()}
    whole = {"embedding.word_embeddings.weight": (m.vocab, m.hidden), "decoder.final_layernorm.weight": (m.hidden,)}
    return whole | stack


def hollow_base(m: Model) -> None:
    """The base of a dense, tied bf16 model: headers and room for its tensors, zeros that take no disk."""
    folder = Path(m.checkpoint)
    folder.mkdir(parents=True)
    ids = [{"content": token, "id": i} for i, token in enumerate(facts(m.family).tiny.special)]
    tiny.hf_config(m, ids).save_pretrained(folder)
    entries = {n: safetensors_file.Entry("BF16", shape, 0, 2 * math.prod(shape)) for n, shape in trained(m).items()}
    safetensors_file.create(folder / "model.safetensors", entries)
