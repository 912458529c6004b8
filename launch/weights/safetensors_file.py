"""The layout of one safetensors file: eight bytes with the header's length, the header as JSON, the tensors' bytes."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from recipes import json_file
from recipes.errors import CheckpointError


@dataclass(frozen=True)
class Entry:
    """A tensor in a file."""

    dtype: str  # as safetensors names it: BF16, F32
    shape: tuple[int, ...]
    start: int  # of its bytes, from the file's first
    size: int  # in bytes


def entries(path: Path) -> dict[str, Entry]:
    """Every tensor of a file, from its header alone. Raises `CheckpointError` where the file is not as long as its header says, or
    has bytes that are no tensor's: safetensors' own reader takes neither."""
    try:
        with path.open("rb") as file:
            first = 8 + int.from_bytes(file.read(8), "little")
            there = os.fstat(file.fileno()).st_size
            header = json.loads(file.read(first - 8)) if first <= there else None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{path}' cannot be read: {error}", "copy it anew") from error
    if header is None:
        raise CheckpointError(
            f"'{path}' has {there:,} bytes and its header alone {first:,}: it was cut off", "copy it anew"
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
            found[name] = Entry(str(of["dtype"]), tuple(map(int, of["shape"])), first + start, end - start)
            if first + end > there:
                raise CheckpointError(
                    f"'{path}' has {there:,} bytes, and {name} ends at {first + end:,}", "copy it anew"
                )
    at = first
    for name, one in sorted(found.items(), key=lambda named: (named[1].start, named[1].size)):
        if one.start != at:
            raise CheckpointError(f"'{path}': {name} begins at byte {one.start:,}, and {at:,} is next", "copy it anew")
        at += one.size
    if at != there:
        raise CheckpointError(f"'{path}' has {there:,} bytes, and its tensors end at {at:,}", "copy it anew")
    return found


def create(path: Path, tensors: Mapping[str, Entry]) -> dict[str, Entry]:
    """Writes the header of a new file, with room for tensors of these dtypes, shapes and sizes; where each one's bytes go."""
    # The widest dtypes first, so that each tensor is aligned.
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
    """Bytes of an element; of a tensor without any, none."""
    count = 1
    for n in entry.shape:
        count *= n
    return entry.size // count if count else 0
