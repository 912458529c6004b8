"""Which trajectories form a step, and which rank runs which sequences in which micro-batch: a pure function.

Contract: an epoch is cut into round(n / batch_size) steps, at least one, whose sizes differ by at most one; each trajectory
comes once an epoch (or `copies` times, n counting them); all sequences of a trajectory are in the same step. Only the number
of trajectories, the batch size, the seed and the epoch decide which trajectories form a step, so every layout trains on the
same steps and a resume needs only the step's number. Lengths and layout decide the rank, the micro-batch and the order.

`Sampling.stream` is slime's own data source instead, for `experiment=released`: floor(n / batch_size) steps an epoch of
exactly batch_size, cut from an endless row of shuffled epochs, so that a run ends before its last epoch does; and slime's own
packing, which lets a sequence over the cap run alone above it.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from recipes.config import Recipe, Recompute, Sampling
from recipes.dimensions import flops
from recipes.errors import ConfigError
from recipes.layout import batch_multiple, data_parallel, micro_batch_multiple, round_up, sequence_multiple
from recipes.schedule.assign import assign
from recipes.schedule.pipeline import Pipeline
from recipes.schedule.slime_packing import divided, first_fit

MicroBatch = tuple[int, ...]  # indices of sequences
ROUNDS_IN_ALL = 20_000  # times sequences, for all steps of an epoch


@dataclass(frozen=True)
class Step:
    """One optimizer step: `ranks[dp_rank][i]` is that rank's i-th micro-batch; all ranks run equally many."""

    epoch: int
    trajectories: tuple[int, ...]
    ranks: tuple[tuple[MicroBatch, ...], ...]

    @property
    def sequences(self) -> list[int]:
        """Every sequence of the step once, in the order of the data set."""
        return sorted({s for rank in self.ranks for micro_batch in rank for s in micro_batch})


@dataclass(frozen=True)
class Schedule:
    """The steps of a run.

    trajectory: for every sequence, the number (0 to n-1) of the trajectory it belongs to.
    lengths: for every sequence, its tokens.
    max_tokens: cap of a micro-batch, padding counted: each sequence padded to `sequence_multiple`, the sum to
    `batch_multiple`. `micro_batch_multiple`: every rank's number of micro-batches is a multiple of it.
    costs: for every sequence, a forward pass over it, in any unit. pipeline: what the micro-batches of a rank run through;
    rounds: of the search in a step that has one, fewer where there are many sequences.
    """

    trajectory: Sequence[int]
    lengths: Sequence[int]
    costs: Sequence[float]
    batch_size: int
    epochs: int
    seed: int
    dp: int
    max_tokens: int
    sequence_multiple: int = 1
    batch_multiple: int = 1
    micro_batch_multiple: int = 1
    copies: int = 1
    sampling: Sampling = Sampling.epochs
    pipeline: Pipeline = field(default_factory=Pipeline)
    rounds: int = 200
    _of: dict[int, list[int]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if not self.lengths:
            raise ConfigError("the data set holds no sequence", "see its ledger.jsonl")
        for sequence, trajectory in enumerate(self.trajectory):
            self._of.setdefault(trajectory, []).append(sequence)
        if self.sampling is Sampling.stream and self.batch_size > self._rows:
            raise ConfigError(
                f"optim.sampling=stream cuts no batch of {self.batch_size} from {self._rows} rows and would train nothing",
                f"write optim.batch_size={self._rows} or less, or optim.sampling=epochs",
            )
        longest = max(self.lengths)
        if self.sampling is Sampling.epochs and self.padded([longest]) > self.max_tokens:
            raise ConfigError(
                f"the longest sequence has {longest} tokens, {self.padded([longest])} with padding, over the cap of "
                f"{self.max_tokens} a micro-batch (layout.max_tokens_per_gpu x layout.cp)",
                "raise layout.max_tokens_per_gpu or layout.cp",
            )

    @property
    def steps_per_epoch(self) -> int:
        if self.sampling is Sampling.stream:
            return self._rows // self.batch_size
        return max(1, round(self._rows / self.batch_size))

    @property
    def _rows(self) -> int:
        """Trajectories of an epoch."""
        return len(self._of) * self.copies

    @property
    def num_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def padded(self, lengths: Sequence[int]) -> int:
        """Tokens of a micro-batch of these lengths as the engine pads it."""
        return round_up(sum(round_up(n, self.sequence_multiple) for n in lengths), self.batch_multiple)

    def check(self) -> None:
        """Raises `ConfigError` where the sequences of some step cannot be spread evenly over the ranks. Quick: the search,
        which moves sequences and never changes how many micro-batches there are, is left out."""
        quick = replace(self, rounds=0)
        for number in range(self.num_steps):
            quick.step(number)

    def step(self, number: int) -> Step:
        """Step `number`, from 0. Raises `ConfigError` where its sequences cannot be spread evenly over the ranks."""
        if self.sampling is Sampling.stream:
            epoch, start = divmod(number * self.batch_size, self._rows)
            chosen = (self._epoch(epoch) + self._epoch(epoch + 1))[start : start + self.batch_size]
        else:
            epoch, place = divmod(number, self.steps_per_epoch)
            size, larger = divmod(self._rows, self.steps_per_epoch)
            start = place * size + min(place, larger)
            chosen = self._epoch(epoch)[start : start + size + (place < larger)]
        return Step(epoch, tuple(chosen), self.assign([s for t in chosen for s in self._of[t]]))

    def _epoch(self, epoch: int) -> list[int]:
        """The trajectories of an epoch in the order they come."""
        order = sorted(self._of) * self.copies
        # A string seed is hashed by Python's own SHA-512, the same on every platform and version.
        random.Random(f"limi:{self.seed}:{epoch}").shuffle(order)
        return order

    def loads(self, step: Step) -> tuple[np.ndarray, np.ndarray]:
        """[dp, micro-batches] padded tokens of a step's micro-batches, and the causal pairs n (n + 1) / 2 of their sequences."""
        tokens = [[self.padded([self.lengths[s] for s in b]) for b in rank] for rank in step.ranks]
        pairs = [[sum(self.lengths[s] * (self.lengths[s] + 1) // 2 for s in b) for b in rank] for rank in step.ranks]
        return np.array(tokens), np.array(pairs, dtype=float)

    def assign(self, sequences: Sequence[int]) -> tuple[tuple[MicroBatch, ...], ...]:
        """Spreads the sequences of one step over ranks and micro-batches, so that it ends soonest; see `assign.py`."""
        if self.sampling is Sampling.stream:
            lengths = [self.lengths[s] for s in sequences]
            batches = divided(first_fit(lengths, self.max_tokens), lengths, self.dp * self.micro_batch_multiple)
            return tuple(tuple(tuple(sequences[i] for i in b) for b in batches[r :: self.dp]) for r in range(self.dp))

        def fits(chosen: Sequence[int]) -> bool:
            return self.padded([self.lengths[sequences[i]] for i in chosen]) <= self.max_tokens

        costs = [self.costs[s] for s in sequences]
        rounds = min(self.rounds, ROUNDS_IN_ALL // len(self.lengths))
        ranks = assign(costs, fits, self.dp, self.pipeline, self.micro_batch_multiple, rounds)
        return tuple(tuple(tuple(sequences[i] for i in b) for b in rank) for rank in ranks)


@dataclass(frozen=True)
class Rehearsal(Schedule):
    """Two steps that hold as much as any of the run's: every rank fills its pipeline with the fullest micro-batch, and runs the
    longest sequence too."""

    @property
    def num_steps(self) -> int:
        return 2

    def step(self, number: int) -> Step:
        longest = max(range(len(self.lengths)), key=self.lengths.__getitem__)
        batches = (self.fullest,) * round_up(self.pipeline.stages, self.micro_batch_multiple)
        if longest not in self.fullest:
            batches += ((longest,),) * self.micro_batch_multiple
        return Step(0, tuple(sorted({self.trajectory[s] for b in batches for s in b})), (batches,) * self.dp)

    @cached_property
    def fullest(self) -> MicroBatch:
        """Of all micro-batches of the run, the one of the most tokens."""
        ranks = [rank for number in range(super().num_steps) for rank in self._of_run(number)]
        return max((b for rank in ranks for b in rank), key=lambda b: self.padded([self.lengths[s] for s in b]))

    def _of_run(self, number: int) -> tuple[tuple[MicroBatch, ...], ...]:
        return super().step(number).ranks


def schedule_of(r: Recipe, trajectory: Sequence[int], lengths: Sequence[int]) -> Schedule:
    """The steps of a run over these sequences. trajectory, lengths: as `Schedule` takes them."""
    p, cost = r.layout, flops(r.model)
    longest = round_up(round_up(max(lengths, default=0), sequence_multiple(p)), batch_multiple(p, r.engine.name))
    if r.optim.sampling is Sampling.epochs and longest > p.max_tokens_per_gpu * p.cp:
        raise ConfigError(
            f"the longest sequence has {longest:,} tokens with padding, over the cap of {p.max_tokens_per_gpu * p.cp:,} a "
            f"micro-batch (layout.max_tokens_per_gpu {p.max_tokens_per_gpu:,} x cp {p.cp})",
            f"write layout.max_tokens_per_gpu={-(-longest // p.cp)}, or a larger layout.cp",
        )
    return Schedule(
        trajectory=trajectory,
        lengths=lengths,
        costs=[cost.sequence(n) for n in lengths],
        batch_size=r.optim.batch_size,
        epochs=r.optim.epochs,
        seed=r.seed,
        dp=data_parallel(r),
        max_tokens=p.max_tokens_per_gpu * p.cp,
        sequence_multiple=sequence_multiple(p),
        batch_multiple=batch_multiple(p, r.engine.name),
        micro_batch_multiple=micro_batch_multiple(p),
        copies=r.optim.copies,
        sampling=r.optim.sampling,
        pipeline=Pipeline(p.pp, 3.0 if p.recompute in (Recompute.linear, Recompute.full) else 2.0, p.vpp),
    )
