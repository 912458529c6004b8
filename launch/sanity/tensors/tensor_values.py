"""Checks of tensor values. Several processes read every tensor of an export once, together with the base's."""

import math
from collections.abc import Sequence
from functools import partial

from rich.console import Console

from launch.checks import Check
from launch.sanity.tensors import bands, compare_worker, looks
from launch.sanity.tensors.compare_worker import Pair, Reach, Seen, Stored
from launch.sanity.tensors.prints import Wanted
from launch.weights import tensor_work
from launch.weights.safetensors_folder import SafetensorsFolder
from launch.weights.shards import WIDTHS, Shards
from recipes.config import Model, Optim
from recipes.families.common.parts import OUTPUT

BATCH_BYTES = 256 << 20  # bytes of the export in one worker task
_PRINTED = 1 << 21  # elements of fingerprints, of all tensors together
_LEAST_PRINTED = 256  # elements per tensor: unrelated tensors of this many have a cosine within 0.25 of zero


def reach(o: Optim, rates: Sequence[float] | None) -> Reach:
    """Return the limits of what training at these rates (one per step) can change. Without rates there is no limit."""
    total = math.inf if rates is None else sum(rates)
    # Rounding to bf16 changes an element by up to 2**-9 of it; twice that allows for a base that is not bf16.
    return Reach(total, 2**-8 + (0.0 if rates is None else o.weight_decay * total))


def compare(
    shards: Shards, base: SafetensorsFolder, m: Model, training: Reach, digested: bool, console: Console
) -> dict[str, Seen]:
    """Measure every tensor whose bytes exist, and return the results by name. Show a progress bar on a terminal.

    digested: whether to compute digests.
    """
    there = {name: entry for name, entry in shards.entries.items() if entry.dtype in WIDTHS}
    most = max(_LEAST_PRINTED, _PRINTED // max(1, len(there)))
    pairs = [
        Pair(
            name,
            Stored(shards.folder / shards.files[name], entry),
            _beside(name, shards, base, m),
            Wanted(bands.bands(name, entry.shape, m), most),
        )
        for name, entry in there.items()
    ]
    work = partial(compare_worker.look, training, digested)
    batches = list(tensor_work.cut(pairs, BATCH_BYTES))
    done = tensor_work.each("Comparing", work, batches, compare_worker.start, console)
    return {seen.name: seen for batch in done for seen in batch}


def _beside(name: str, shards: Shards, base: SafetensorsFolder, m: Model) -> Stored | None:
    """Return what a tensor is compared with, or None: the base's tensor of its name and shape.

    The copy of a tied output layer is compared with the export's own embedding.
    """
    copy = m.tied and name == OUTPUT
    of: Shards | SafetensorsFolder = shards if copy else base
    other = "model.embed_tokens.weight" if copy else name
    there = of.entries.get(other)
    if there is None or there.shape != shards.entries[name].shape or there.dtype not in WIDTHS:
        return None
    return Stored(of.folder / of.files[other], there)


def value_checks(seen: dict[str, Seen], shards: Shards, m: Model) -> list[Check]:
    """Return the checks of the values and of a tied output layer's copy."""
    figure = f"{len(seen)} of {len(shards.files)} tensors read"

    def finite() -> tuple[str, Sequence[str]]:
        return figure, [
            f"{s.name} has {s.not_finite:,} of {s.elements:,} elements NaN or infinite"
            for s in seen.values()
            if s.not_finite
        ]

    def zero() -> tuple[str, Sequence[str]]:
        empty = [s for s in seen.values() if s.zero and s.elements]
        return figure, [f"{s.name} is all zero" for s in empty if s.base is None or not s.base.zero]

    def tied() -> tuple[str, Sequence[str]]:
        copy = seen.get(OUTPUT)
        if not m.tied:
            return "not tied", []
        if copy is None:
            return "written once", []
        equal = copy.base is not None and copy.base.equal
        return "written twice", [] if equal else [
            f"{OUTPUT} differs from model.embed_tokens.weight, which servers use instead"
        ]

    return [
        looks.file_check("finite numbers", "a server that answers nothing but NaN", "no NaN, no infinity", finite),
        looks.file_check("tensors not zero", "weights that were never written", "none but the base's", zero),
        looks.file_check(
            "tied output layer", "a server that uses the wrong one of two different copies", "one, or two equal", tied
        ),
    ]
