"""What makes files of tensors a Hugging Face folder: their names, the index, `config.json`, the base's tokenizer, every hash."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_prep.files import sha256, write_text
from recipes.checkpoint_config import exported
from recipes.config import Model

FILE_BYTES = 4 << 30  # about as large is a file of tensors
INDEX = "model.safetensors.index.json"
MANIFEST = "export.json"  # the SHA-256 of every other file, as it was written
_KEPT_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "vocab.json", "merges.txt",
    "generation_config.json",
)  # fmt: skip


def file_name(number: int, of: int) -> str:
    """The first number is 1."""
    return f"model-{number:05}-of-{of:05}.safetensors"


def name_shards(folder: Path, weight_map: dict[str, str]) -> dict[str, str]:
    """Renames files as Hugging Face does; {tensor: new name}. weight_map: {tensor: file}."""
    files = sorted(set(weight_map.values()))
    names = {old: file_name(i, len(files)) for i, old in enumerate(files, 1)}
    for old, new in names.items():
        (folder / old).rename(folder / new)
    return {tensor: names[old] for tensor, old in weight_map.items()}


def finish(folder: Path, weight_map: dict[str, str], m: Model) -> None:
    """Writes what belongs beside the tensors. weight_map: {tensor: file}."""
    base = Path(m.checkpoint)
    size = sum(_tensor_bytes(folder / name) for name in set(weight_map.values()))
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
    config = exported(m, json.loads((base / "config.json").read_text()))
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    for name in _KEPT_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    write_text(folder / MANIFEST, json.dumps({"files": hashes(folder)}, indent=2) + "\n")


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of an export but its manifest, by name."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name != MANIFEST)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing leaves other threads their cores
        return dict(zip((p.name for p in files), pool.map(sha256, files), strict=True))


def _tensor_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
