"""Checks of the tensors listed in an export's index and readable shard headers, compared with the base's."""

from collections.abc import Sequence

from launch.checks import Check
from launch.sanity.tensors import looks
from launch.weights.safetensors_folder import SafetensorsFolder
from launch.weights.shards import Shards
from recipes.checkpoint.tensors import is_mtp
from recipes.config import Model
from recipes.families.common.parts import OUTPUT


def wanted(base: SafetensorsFolder, m: Model) -> set[str]:
    """Return the expected tensor names of an export, without MTP layers.

    A tied output layer is left out too: either engine may write the copy or omit it.
    """
    return {n for n in base.entries if not is_mtp(n, m)} - ({OUTPUT} if m.tied else set())


def shape_checks(shards: Shards, base: SafetensorsFolder, m: Model) -> list[Check]:
    """Return the checks of the index with its shards, and of tensor names, shapes and dtypes."""

    def whole() -> tuple[str, Sequence[str]]:
        figure = f"{len(shards.entries)} of {len(shards.files)} tensors in {len(set(shards.files.values()))} shards"
        size = sum(e.size for e in shards.entries.values())
        if (wrong := [*shards.faults, *shards.beside.values()]) or shards.total == size:
            return figure, wrong
        return figure, [f"the index says {shards.total} bytes, but the tensors have {size}"]

    def names() -> tuple[str, Sequence[str]]:
        expected = wanted(base, m)
        there = {n for n in shards.files if not is_mtp(n, m)} - ({OUTPUT} if m.tied else set())
        missing, unknown = sorted(expected - there), sorted(there - expected)
        lines = [f"{n} is missing" for n in missing] + [f"{n} is not in the base" for n in unknown]
        return f"{len(expected & there)} of {len(expected)}", lines

    def same(field: str) -> tuple[str, Sequence[str]]:
        pairs = {
            n: (getattr(e, field), getattr(base.entries[n], field))
            for n, e in shards.entries.items()
            if n in base.entries
        }
        lines = [f"{n} is {_shown(a)}, the base's {_shown(b)}" for n, (a, b) in pairs.items() if a != b]
        return f"{len(pairs) - len(lines)} of {len(pairs)}", lines

    return [
        looks.file_check("shards", "a copy that lost files, bytes or index entries", "all present, none twice", whole),
        looks.file_check("tensor names", "weights that a server leaves at random values", "the base's", names),
        looks.file_check("tensor shapes", "weights that no server loads", "the base's", lambda: same("shape")),
        looks.file_check("tensor dtypes", "weights of lost or wasted precision", "the base's", lambda: same("dtype")),
    ]


def _shown(value: object) -> str:
    return str(list(value) if isinstance(value, tuple) else value)
