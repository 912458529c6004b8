"""The export beside the trainer's own checkpoint, bit for bit: no statistics, so at any rate and after any number of steps.

The checkpoint is read once more, by another reading of its names than the export's (`trainers.py`), and the digests of both are
compared. That the trainer's weights are what the model computes with is the held-out loss's to show, by the server and by the trainer.
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
from launch.sanity.tensors.compare_worker import DTYPES, Seen
from launch.sanity.tensors.digests import Digest
from launch.weights import tensor_work
from launch.weights.safetensors_file import Entry
from launch.weights.shards import Shards
from launch.weights.torch_dist import Piece, TorchDist
from recipes.checkpoint.tensors import is_mtp
from recipes.config import Model
from recipes.errors import CheckpointError

BATCH_BYTES = 256 << 20  # of the checkpoint, a worker's task
_NAME, _PROTECTS = "weights as trained", "weights that were written to another's place, or are not the last step's"


def read(checkpoint: Path, shards: Shards, m: Model, console: Console) -> dict[str, Digest]:
    """What every tensor of the export should be, by name, but for those that an export takes from its base.

    Raises `CheckpointError` where the checkpoint cannot be read or has not all of them.
    """
    parameters = [*_parameters(TorchDist(checkpoint), shards.entries, m)]
    work = partial(trained_worker.look, checkpoint, m)
    batches = list(tensor_work.cut(parameters, BATCH_BYTES))
    done = tensor_work.each("Comparing with the checkpoint", work, batches, compare_worker.start, console)
    return {name: digest for batch in done for name, digest in batch.items()}


def _parameters(checkpoint: TorchDist, entries: Mapping[str, Entry], m: Model) -> Sequence[Parameter]:
    found = []
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
                    f"'{checkpoint.folder}' holds {name}, which {m.name} has not", "see model.*"
                ) from error
            # One that is not in the export, or in another shape or dtype, is for other checks to say.
            there = {n: entries[n] for n, rows in homes.items() if n in entries and _fits(entries[n], len(rows), shape)}
            found.append(Parameter(name, key, lead, shape, stored.dtype, tuple(held), there))
    return found


def _fits(entry: Entry, rows: int, shape: tuple[int, ...]) -> bool:
    return bool(entry.shape) and (entry.shape[0] <= rows, entry.shape[1:], entry.dtype in DTYPES) == (
        True,
        shape[1:],
        True,
    )


def check(seen: Mapping[str, Seen], trained: Mapping[str, Digest], checkpoint: Path, m: Model) -> Check:
    """seen: what an export holds beside the copy of a tied output layer. trained: of `read`."""
    own = {n: s for n, s in seen.items() if not is_mtp(n, m) and not n.endswith("e_score_correction_bias")}
    exact = same(own, trained)
    lines = _causes({n: s for n, s in own.items() if n not in exact}, trained, m)
    figure = f"{len(exact)} of {len(own)} tensors, bit for bit"
    return Check(_NAME, _PROTECTS, figure, f"all as in {checkpoint.name}", judged(not lines), looks.some(lines))


def same(seen: Mapping[str, Seen], trained: Mapping[str, Digest]) -> set[str]:
    """The tensors that are the trainer's, bit for bit."""
    return {n for n, s in seen.items() if s.digest is not None and s.digest == trained.get(n)}


def not_compared(why: str) -> Check:
    return Check(_NAME, _PROTECTS, "not compared", "all as in the trainer's checkpoint", Outcome.warned, why)


def _causes(differing: Mapping[str, Seen], trained: Mapping[str, Digest], m: Model) -> list[str]:
    """A line for every tensor, what it holds where that is told by its digest."""
    by_rows = {d.rows: n for n, d in trained.items()}
    families: dict[str, list[str]] = defaultdict(list)
    for name, s in differing.items():
        families[bands(name, s.shape, m).family].append(name)
    mixed = {n for names in families.values() for n in names if _mixed(names, differing, trained)}
    return [_cause(n, s, trained.get(n), by_rows, n in mixed) for n, s in differing.items()]


def _mixed(names: Sequence[str], seen: Mapping[str, Seen], trained: Mapping[str, Digest]) -> bool:
    """Whether all rows of these tensors together are the trainer's, in whatever place."""
    pairs = [(seen[n].digest, trained.get(n)) for n in names]
    return len(names) > 1 and not sum(a.any_rows - b.any_rows if a and b else 1 for a, b in pairs) % 2**64


def _cause(name: str, s: Seen, wanted: Digest | None, by_rows: Mapping[int, str], mixed: bool) -> str:
    found = s.digest
    if found is None or wanted is None:
        return f"{name} is not in the checkpoint"
    other = by_rows.get(found.rows)
    told = {
        f"is the checkpoint's {other}{how(name, other or '')}": other is not None,
        "is the checkpoint's transposed": found.rows == wanted.columns,
        "has its rows in another order": found.any_rows == wanted.any_rows,
        "has its columns in another order": found.any_columns == wanted.any_columns,
        "has rows of its neighbours, in another order": mixed,
        "is the base's, not the checkpoint's": s.base is not None and s.base.equal,
    }
    what = next((text for text, so in told.items() if so), "is not the checkpoint's")
    return f"{name} {what}"
