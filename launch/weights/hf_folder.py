"""What makes files of tensors a Hugging Face folder: their names, the index, `config.json`, the base's tokenizer, and the record
of what it was made from, with every file's hash."""

import contextlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data_prep.files import sha256, write_text
from recipes import json_file
from recipes.checkpoint.checkpoint_config import AGAIN, exported, read_config
from recipes.config import Model

FILE_BYTES = 4 << 30  # about as large is a file of tensors
INDEX = "model.safetensors.index.json"
# Written last: the name of the checkpoint that was exported, `model.mtp`, and every other file's SHA-256 and bytes.
MANIFEST = "export.json"
_KEPT_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "vocab.json", "merges.txt",
    "generation_config.json",
)  # fmt: skip


def file_name(number: int, of: int) -> str:
    """The first number is 1."""
    return f"model-{number:05}-of-{of:05}.safetensors"


def check_kept(base: Path) -> None:
    """Raises `CheckpointError` for the first small file that an export takes over and no reader could read."""
    for name in _KEPT_FILES:
        if name.endswith("_config.json") or name.endswith("_map.json"):
            with contextlib.suppress(FileNotFoundError):
                json_file.read(base / name, AGAIN)


def finish(folder: Path, weight_map: dict[str, str], m: Model, checkpoint: str) -> None:
    """Writes what belongs beside the tensors. weight_map: {tensor: file}. checkpoint: the name of what they are of."""
    base = Path(m.checkpoint)
    size = sum(_tensor_bytes(folder / name) for name in set(weight_map.values()))
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
    config = exported(m, read_config(base))
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    for name in _KEPT_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    files = hashes(folder)
    sizes = {name: (folder / name).stat().st_size for name in files}
    record = {"checkpoint": checkpoint, "mtp": m.mtp.value, "files": files, "bytes": sizes}
    write_text(folder / MANIFEST, json.dumps(record, indent=2) + "\n")


def manifest(folder: Path) -> dict[str, Any] | None:
    """What an export says of itself; None where there is none that can be read."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return found if {"checkpoint", "mtp", "files", "bytes"} <= found.keys() else None
    except (FileNotFoundError, ValueError, AttributeError):
        return None


def damage(folder: Path, *, read: bool) -> str | None:
    """What of an export is not as it was written: by the files' names and sizes, and where they are `read` by their SHA-256."""
    written = manifest(folder)
    if written is None:
        return f"its {MANIFEST} cannot be read"
    for name, size in written["bytes"].items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (folder / name).stat().st_size != size:
            return f"{name} is not the file that was written"
    there = hashes(folder) if read else {}
    different = [name for name in there.keys() & written["files"].keys() if there[name] != written["files"][name]]
    return f"{min(different)} is not the file that was written" if different else None


def weight_map(folder: Path) -> dict[str, str]:
    """{tensor: file name} of a folder's index. Raises `CheckpointError` where that cannot be read."""
    path = folder / INDEX
    index = json_file.read(path, AGAIN)
    with json_file.shape(path, AGAIN):
        found: dict[str, str] = index["weight_map"]
        if stray := [file for file in found.values() if file != Path(file).name]:
            raise ValueError(f"weight_map names {stray[0]!r}")
    return found


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of an export but its manifest, by name."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name != MANIFEST)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing leaves other threads their cores
        return dict(zip((p.name for p in files), pool.map(sha256, files), strict=True))


def _tensor_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
