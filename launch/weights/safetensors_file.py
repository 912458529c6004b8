"""Read and create one safetensors file. Its layout: eight bytes with the header's length, the JSON header, the tensors' bytes."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from recipes import json_file
from recipes.errors import CheckpointError


@dataclass(frozen=True)
class Entry:
    """A tensor's entry in a file."""

    dtype: str  # as safetensors names it: BF16, F32
    shape: tuple[int, ...]
    start: int  # offset of its bytes in the file
    size: int  # bytes


def entries(path: Path) -> dict[str, Entry]:
    """Return the entry of every tensor of a file, read from its header alone.

    Raise `CheckpointError` if the file is shorter or longer than its header says, or has bytes outside all tensors.
    safetensors' own reader rejects both cases too.
    """
    try:
        with path.open("rb") as file:
            data_start = 8 + int.from_bytes(file.read(8), "little")
            file_bytes = os.fstat(file.fileno()).st_size
            header = json.loads(file.read(data_start - 8)) if data_start <= file_bytes else None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{path}' cannot be read: {error}", "copy it anew") from error
    if header is None:
        raise CheckpointError(
            f"'{path}' has {file_bytes:,} bytes and its header alone {data_start:,}: it was cut off", "copy it anew"
        )
    if not isinstance(header, dict):
        raise CheckpointError(
            f"'{path}' has {json_file.kind(header)} for a header, and an object belongs there", "copy it anew"
        )
    found = {}
    with json_file.shape(path, "copy it anew"):
        for name, of in header.items():
            if name == "__metadata__":
                continue
            start, end = of["data_offsets"]
            if not 0 <= start <= end:
                raise ValueError(f"{name} from byte {start} to {end}")
            found[name] = Entry(str(of["dtype"]), tuple(map(int, of["shape"])), data_start + start, end - start)
            if data_start + end > file_bytes:
                raise CheckpointError(
                    f"'{path}' has {file_bytes:,} bytes, and {name} ends at {data_start + end:,}", "copy it anew"
                )
    at = data_start
    for name, one in sorted(found.items(), key=lambda named: (named[1].start, named[1].size)):
        if one.start != at:
            raise CheckpointError(f"'{path}': {name} begins at byte {one.start:,}, and {at:,} is next", "copy it anew")
        at += one.size
    if at != file_bytes:
        raise CheckpointError(f"'{path}' has {file_bytes:,} bytes, and its tensors end at {at:,}", "copy it anew")
    return found


def create(path: Path, tensors: Mapping[str, Entry]) -> dict[str, Entry]:
    """Write the header of a new file with space for these tensors. Return the entries with their offsets in the file."""
    # Put the widest dtypes first, so each tensor is aligned.
    by_width = sorted(tensors, key=lambda name: -_width(tensors[name]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name in by_width:
        of, starts[name] = tensors[name], end
        end += of.size
        header[name] = {"dtype": of.dtype, "shape": of.shape, "data_offsets": [starts[name], end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return {name: replace(tensors[name], start=8 + len(text) + starts[name]) for name in by_width}


def _width(entry: Entry) -> int:
    """Return the bytes per element; 0 for an empty tensor."""
    count = 1
    for n in entry.shape:
        count *= n
    return entry.size // count if count else 0
