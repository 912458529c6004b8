"""Comparison of an export with the trainer's own checkpoint, bit for bit. It uses no statistics: it holds at any learning rate
and after any number of steps.

The checkpoint is read by an independent implementation of its names (`trainers.py`), not by the export's, and the digests of both
are compared. Whether the model computes with the trainer's weights is shown by the held-out loss, of the server and of the trainer.
"""

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from launch.checks import Check, Outcome, judged
from launch.sanity.files import trained_worker, trainers
from launch.sanity.files.misplaced import how
from launch.sanity.files.trained_worker import Parameter
from launch.sanity.tensors import compare_worker, looks
from launch.sanity.tensors.bands import bands
from launch.sanity.tensors.compare_worker import Seen
from launch.sanity.tensors.digests import Digest
from launch.weights import tensor_work
from launch.weights.dtypes import DTYPES
from launch.weights.safetensors_file import Entry
from launch.weights.shards import Shards
from launch.weights.torch_dist import Piece, TorchDist
from recipes.checkpoint.tensors import is_mtp
from recipes.config import Model
from recipes.errors import CheckpointError

BATCH_BYTES = 256 << 20  # bytes of the checkpoint in one worker task
_NAME, _PROTECTS = (
    "weights as trained",
    "weights written under another name or in another order, or not from the last step",
)


def read_trained(checkpoint: Path, shards: Shards, m: Model, console: Console) -> dict[str, Digest]:
    """Return the expected digest of every tensor of the export by name, except tensors that an export takes from its base.

    Raise `CheckpointError` if the checkpoint cannot be read or lacks elements of a tensor.
    """
    parameters = [*_parameters(TorchDist(checkpoint), shards.entries, m)]
    work = partial(trained_worker.look, checkpoint, m)
    batches = list(tensor_work.cut(parameters, BATCH_BYTES))
    done = tensor_work.each("Comparing with the checkpoint", work, batches, compare_worker.start, console)
    return {name: digest for batch in done for name, digest in batch.items()}


def _parameters(checkpoint: TorchDist, entries: Mapping[str, Entry], m: Model) -> Sequence[Parameter]:
    """Return the checkpoint's parameters, one per layer and expert. Raise `CheckpointError` if the model lacks one of them."""
    parameters = []
    for key, stored in checkpoint.tensors.items():
        count = trainers.leading(key)
        pieces: dict[tuple[int, ...], list[Piece]] = defaultdict(list)
        for piece in stored.pieces:
            spans = [range(a, a + n) for a, n in zip(piece.start[:count], piece.shape[:count], strict=True)]
            for lead in itertools.product(*spans):
                pieces[lead].append(piece)
        for lead, held in pieces.items():
            name, shape = trainers.parameter(key, lead), stored.shape[count:]
            try:
                homes = trainers.homes(name, shape[0], m)
            except (KeyError, ValueError) as error:
                raise CheckpointError(
                    f"'{checkpoint.folder}' holds {name}, which {m.name} does not have", "see model.*"
                ) from error
            # Tensors that the export lacks, or has in another shape or dtype, are reported by other checks.
            there = {n: entries[n] for n, rows in homes.items() if n in entries and _fits(entries[n], len(rows), shape)}
            parameters.append(Parameter(name, key, lead, shape, stored.dtype, tuple(held), there))
    return parameters


def _fits(entry: Entry, rows: int, shape: tuple[int, ...]) -> bool:
    return bool(entry.shape) and (entry.shape[0] <= rows, entry.shape[1:], entry.dtype in DTYPES) == (
        True,
        shape[1:],
        True,
    )


def as_trained(seen: Mapping[str, Seen], trained: Mapping[str, Digest], checkpoint: Path, m: Model) -> Check:
    """Check that the export equals the trainer's checkpoint.

    seen: the export's tensors by name, without the copy of a tied output layer. trained: expected digests, from `read`.
    """
    own = {n: s for n, s in seen.items() if not is_mtp(n, m) and not n.endswith("e_score_correction_bias")}
    exact = same(own, trained)
    lines = _causes({n: s for n, s in own.items() if n not in exact}, trained, m)
    figure = f"{len(exact)} of {len(own)} tensors, bit for bit"
    return Check(
        _NAME, _PROTECTS, figure, f"all tensors equal those of {checkpoint.name}", judged(not lines), looks.some(lines)
    )


def same(seen: Mapping[str, Seen], trained: Mapping[str, Digest]) -> set[str]:
    """Return the names of the tensors that equal the trainer's, bit for bit."""
    return {n for n, s in seen.items() if s.digest is not None and s.digest == trained.get(n)}


def not_compared(why: str) -> Check:
    """Return the check's result when there is no checkpoint to compare with: a warning."""
    return Check(
        _NAME, _PROTECTS, "not compared", "all tensors equal those of the trainer's checkpoint", Outcome.warned, why
    )


def _causes(differing: Mapping[str, Seen], trained: Mapping[str, Digest], m: Model) -> list[str]:
    """Return one line per differing tensor. It says what the tensor holds, if its digest shows that."""
    by_rows = {d.rows: n for n, d in trained.items()}
    families: dict[str, list[str]] = defaultdict(list)
    for name, s in differing.items():
        families[bands(name, s.shape, m).family].append(name)
    mixed = {n for names in families.values() for n in names if _mixed(names, differing, trained)}
    return [_cause(n, s, trained.get(n), by_rows, n in mixed) for n, s in differing.items()]


def _mixed(names: Sequence[str], seen: Mapping[str, Seen], trained: Mapping[str, Digest]) -> bool:
    """Return whether these tensors together hold exactly the trainer's rows, in any order."""
    pairs = [(seen[n].digest, trained.get(n)) for n in names]
    return len(names) > 1 and not sum(a.any_rows - b.any_rows if a and b else 1 for a, b in pairs) % 2**64


def _cause(name: str, s: Seen, wanted: Digest | None, by_rows: Mapping[int, str], mixed: bool) -> str:
    actual = s.digest
    if actual is None or wanted is None:
        return f"{name} is not in the checkpoint"
    other = by_rows.get(actual.rows)
    causes = {
        f"is the checkpoint's {other}{how(name, other or '')}": other is not None,
        "is the checkpoint's transposed": actual.rows == wanted.columns,
        "has its rows in another order": actual.any_rows == wanted.any_rows,
        "has its columns in another order": actual.any_columns == wanted.any_columns,
        "has rows of its neighbours, in another order": mixed,
        "is the base's, not the checkpoint's": s.base is not None and s.base.equal,
    }
    what = next((text for text, applies in causes.items() if applies), "is not the checkpoint's")
    return f"{name} {what}"
