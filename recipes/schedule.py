"""Which trajectories form a step, and which rank runs which sequences in which micro-batch: a pure function.

Contract: an epoch is cut into round(n / batch_size) steps, at least one, whose sizes differ by at most one; each
trajectory comes once an epoch; all sequences of a trajectory are in the same step. Only the number of trajectories,
the batch size, the seed and the epoch decide which trajectories form a step, so every layout trains on the same
steps and a resume needs only the step's number. Lengths and layout decide the rank, the micro-batch and the order.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from recipes.errors import ConfigError

MicroBatch = tuple[int, ...]  # indices of sequences


@dataclass(frozen=True)
class Step:
    """One optimizer step: `ranks[dp_rank][i]` is that rank's i-th micro-batch; all ranks run equally many."""

    epoch: int
    trajectories: tuple[int, ...]
    ranks: tuple[tuple[MicroBatch, ...], ...]


@dataclass(frozen=True)
class Schedule:
    """The steps of a run.

    trajectory: for every sequence, the number (0 to n-1) of the trajectory it belongs to.
    lengths: for every sequence, its tokens.
    max_tokens: cap of a micro-batch, padding counted: each sequence padded to `sequence_multiple`, the sum to
    `batch_multiple`. `micro_batch_multiple`: every rank's number of micro-batches is a multiple of it.
    """

    trajectory: Sequence[int]
    lengths: Sequence[int]
    batch_size: int
    epochs: int
    seed: int
    dp: int
    max_tokens: int
    sequence_multiple: int = 1
    batch_multiple: int = 1
    micro_batch_multiple: int = 1
    _of: dict[int, list[int]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if not self.lengths:
            raise ConfigError("the data set holds no sequence; see its ledger.jsonl")
        for sequence, trajectory in enumerate(self.trajectory):
            self._of.setdefault(trajectory, []).append(sequence)
        longest = max(self.lengths)
        if self.padded([longest]) > self.max_tokens:
            raise ConfigError(
                f"the longest sequence has {longest} tokens, {self.padded([longest])} with padding, over the cap of "
                f"{self.max_tokens} a micro-batch (layout.max_tokens_per_gpu x layout.cp); raise "
                "layout.max_tokens_per_gpu or layout.cp"
            )

    @property
    def steps_per_epoch(self) -> int:
        return max(1, round(len(self._of) / self.batch_size))

    @property
    def num_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def padded(self, lengths: Sequence[int]) -> int:
        """Tokens of a micro-batch of these lengths as the engine pads it."""
        return _up(sum(_up(n, self.sequence_multiple) for n in lengths), self.batch_multiple)

    def step(self, number: int) -> Step:
        """Step `number`, from 0. Raises `ConfigError` where its sequences cannot be spread evenly over the ranks."""
        epoch, place = divmod(number, self.steps_per_epoch)
        order = sorted(self._of)
        # A string seed is hashed by Python's own SHA-512, the same on every platform and version.
        random.Random(f"limi:{self.seed}:{epoch}").shuffle(order)
        size, larger = divmod(len(order), self.steps_per_epoch)
        start = place * size + min(place, larger)
        chosen = order[start : start + size + (place < larger)]
        return Step(epoch, tuple(chosen), self.assign([s for t in chosen for s in self._of[t]]))

    def assign(self, sequences: Sequence[int]) -> tuple[tuple[MicroBatch, ...], ...]:
        """Spreads the sequences of one step over ranks and micro-batches: first fit decreasing, then the costliest
        micro-batches to the least loaded ranks."""
        bins: list[list[int]] = []
        for s in sorted(sequences, key=lambda s: (-self.lengths[s], s)):
            for b in bins:
                if self.padded([self.lengths[i] for i in (*b, s)]) <= self.max_tokens:
                    b.append(s)
                    break
            else:
                bins.append([s])
        multiple = self.dp * self.micro_batch_multiple
        if len(sequences) < _up(len(bins), multiple):
            raise ConfigError(
                f"a step of {len(sequences)} sequences cannot fill {_up(len(bins), multiple)} micro-batches (a multiple "
                f"of {multiple}: data-parallel ranks x pipeline group); raise optim.batch_size (now {self.batch_size}) or "
                "layout.max_tokens_per_gpu, or lower the number of ranks"
            )
        while len(bins) % multiple:
            widest = max((b for b in bins if len(b) > 1), key=lambda b: sum(self.lengths[s] for s in b))
            half = [widest[i] for i in range(1, len(widest), 2)]
            widest[:] = widest[::2]
            bins.append(half)
        ranks: list[list[MicroBatch]] = [[] for _ in range(self.dp)]
        load = [0] * self.dp
        for b in sorted(bins, key=lambda b: (-self._cost(b), b)):
            room = [r for r in range(self.dp) if len(ranks[r]) < len(bins) // self.dp]
            rank = min(room, key=lambda r: (load[r], r))
            ranks[rank].append(tuple(b))
            load[rank] += self._cost(b)
        return tuple(map(tuple, ranks))

    def _cost(self, sequences: Sequence[int]) -> int:
        # Attention grows with the square; 8192 tokens is where it about equals the rest of these models.
        return sum(n * (8192 + n) for n in (self.lengths[s] for s in sequences))


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
