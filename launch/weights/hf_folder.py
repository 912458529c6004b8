"""Complete files of tensors to a Hugging Face folder.

This adds file names, the index, `config.json`, the base's tokenizer, and a manifest with the source and every file's hash.
"""

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

FILE_BYTES = 4 << 30  # approximate size of one file of tensors
INDEX = "model.safetensors.index.json"
# Written last. It has the name of the exported checkpoint, `model.mtp`, and the SHA-256 and bytes of every other file.
MANIFEST = "export.json"
_COPIED_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "vocab.json", "merges.txt",
    "generation_config.json",
)  # fmt: skip


def file_name(number: int, of: int) -> str:
    """Return the name of file `number` (counted from 1) of `of` files."""
    return f"model-{number:05}-of-{of:05}.safetensors"


def check_kept(base: Path) -> None:
    """Raise `CheckpointError` for the first unreadable JSON file that an export would copy from the base."""
    for name in _COPIED_FILES:
        if name.endswith("_config.json") or name.endswith("_map.json"):
            with contextlib.suppress(FileNotFoundError):
                json_file.read_json(base / name, AGAIN)


def finish(folder: Path, weight_map: dict[str, str], m: Model, checkpoint: str) -> None:
    """Write all files next to the tensors. weight_map: {tensor: file}. checkpoint: name of the exported checkpoint."""
    base = Path(m.checkpoint)
    size = sum(_tensor_bytes(folder / name) for name in set(weight_map.values()))
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
    config = exported(m, read_config(base))
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    for name in _COPIED_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    files = hashes(folder)
    sizes = {name: (folder / name).stat().st_size for name in files}
    record = {"checkpoint": checkpoint, "mtp": m.mtp.value, "files": files, "bytes": sizes}
    write_text(folder / MANIFEST, json.dumps(record, indent=2) + "\n")


def manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of an export, or None if there is no readable one."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return found if {"checkpoint", "mtp", "files", "bytes"} <= found.keys() else None
    except (FileNotFoundError, ValueError, AttributeError):
        return None


def damage(folder: Path, *, read: bool) -> str | None:
    """Return what is damaged in an export, or None. Compare names and sizes of files; with `read` also their SHA-256."""
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
    """Return {tensor: file name} from a folder's index. Raise `CheckpointError` if the index cannot be read."""
    path = folder / INDEX
    index = json_file.read_json(path, AGAIN)
    with json_file.shape(path, AGAIN):
        found: dict[str, str] = index["weight_map"]
        if stray := [file for file in found.values() if file != Path(file).name]:
            raise ValueError(f"weight_map names {stray[0]!r}")
    return found


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of an export except its manifest, by name."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name != MANIFEST)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases the GIL
        return dict(zip((p.name for p in files), pool.map(sha256, files), strict=True))


def _tensor_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
