"""The schedule of a run: the trajectories of every step, and the sequences of every rank and micro-batch. It is a pure function.

Contract:

- An epoch has round(n / batch_size) steps, at least one. Their sizes differ by at most one. n is the number of trajectories
  times `copies`.
- Each trajectory occurs once per epoch, or `copies` times. All sequences of a trajectory are in the same step.
- Only the number of trajectories, the batch size, the seed and the epoch decide which trajectories form a step. So every layout
  trains on the same steps, and a resume needs only the number of the step.
- Lengths and layout decide the rank, the micro-batch and the order.

`Sampling.stream` follows slime's data source instead, for `experiment=released`. An epoch has floor(n / batch_size) steps of
exactly batch_size, cut from an endless series of shuffled epochs, so a run ends before its last epoch is complete. The packing
is slime's own: a sequence over the cap runs alone.
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
ROUNDS_IN_ALL = 20_000  # limit of search rounds x sequences, for all steps of an epoch


@dataclass(frozen=True)
class Step:
    """One optimizer step. `ranks[dp_rank][i]` is the i-th micro-batch of that rank. All ranks run equally many."""

    epoch: int
    trajectories: tuple[int, ...]
    ranks: tuple[tuple[MicroBatch, ...], ...]

    @property
    def sequences(self) -> list[int]:
        """Every sequence of the step once, in data set order."""
        return sorted({s for rank in self.ranks for micro_batch in rank for s in micro_batch})


@dataclass(frozen=True)
class Schedule:
    """The steps of a run. Raise `ConfigError` if there is no sequence, or if no step can be formed from them."""

    trajectory: Sequence[int]  # for every sequence, the number (0 to n-1) of its trajectory
    lengths: Sequence[int]  # for every sequence, its tokens
    costs: Sequence[float]  # for every sequence, the cost of a forward pass, in any unit
    batch_size: int  # trajectories per step
    epochs: int
    seed: int
    dp: int  # data-parallel ranks
    max_tokens: int  # cap of a micro-batch, padding included
    sequence_multiple: int = 1  # each sequence is padded to a multiple of it
    batch_multiple: int = 1  # each micro-batch is padded to a multiple of it
    micro_batch_multiple: int = 1  # every rank's number of micro-batches is a multiple of it
    copies: int = 1  # occurrences of a trajectory in an epoch
    sampling: Sampling = Sampling.epochs
    pipeline: Pipeline = field(default_factory=Pipeline)  # the pipeline that runs a rank's micro-batches
    rounds: int = 200  # limit of search rounds in a step; many sequences lower it
    _of: dict[int, list[int]] = field(init=False, repr=False, default_factory=dict)  # sequences of each trajectory

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
        """Trajectories of an epoch, copies included."""
        return len(self._of) * self.copies

    @property
    def num_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def padded(self, lengths: Sequence[int]) -> int:
        """Return the padded tokens of a micro-batch with these lengths."""
        return round_up(sum(round_up(n, self.sequence_multiple) for n in lengths), self.batch_multiple)

    def check(self) -> None:
        """Raise `ConfigError` if the sequences of any step cannot be spread evenly over the ranks.

        The check skips the search, which never changes the number of micro-batches.
        """
        quick = replace(self, rounds=0)
        for number in range(self.num_steps):
            quick.step(number)

    def step(self, number: int) -> Step:
        """Return step `number`, counted from 0. Raise `ConfigError` if its sequences cannot be spread evenly over the ranks."""
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
        """Return the trajectories of an epoch in training order."""
        order = sorted(self._of) * self.copies
        # Python hashes a string seed with SHA-512, so the order is the same on every platform and version.
        random.Random(f"limi:{self.seed}:{epoch}").shuffle(order)
        return order

    def loads(self, step: Step) -> tuple[np.ndarray, np.ndarray]:
        """Return two arrays [dp, micro-batches] of a step: padded tokens, and causal pairs.

        A sequence of n tokens has n (n + 1) / 2 causal pairs.
        """
        tokens = [[self.padded([self.lengths[s] for s in b]) for b in rank] for rank in step.ranks]
        pairs = [[sum(self.lengths[s] * (self.lengths[s] + 1) // 2 for s in b) for b in rank] for rank in step.ranks]
        return np.array(tokens), np.array(pairs, dtype=float)

    def assign(self, sequences: Sequence[int]) -> tuple[tuple[MicroBatch, ...], ...]:
        """Return the micro-batches of every rank for the sequences of one step, so that it ends soonest; see `assign.py`."""
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
    """Two steps that need as much memory as any step of the run.

    Every rank fills its pipeline with the fullest micro-batch, and also runs the longest sequence.
    """

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
        """The micro-batch with the most tokens in the run."""
        ranks = [rank for number in range(super().num_steps) for rank in self._of_run(number)]
        return max((b for rank in ranks for b in rank), key=lambda b: self.padded([self.lengths[s] for s in b]))

    def _of_run(self, number: int) -> tuple[tuple[MicroBatch, ...], ...]:
        """Return the ranks of the run's own step `number`."""
        return super().step(number).ranks


def schedule_of(r: Recipe, trajectory: Sequence[int], lengths: Sequence[int]) -> Schedule:
    """Return the schedule of a recipe over these sequences. trajectory, lengths: as in `Schedule`.

    Raise `ConfigError` if the longest sequence exceeds the cap of a micro-batch.
    """
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
