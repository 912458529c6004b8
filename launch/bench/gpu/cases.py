"""The rows that `make bench-gpu` measures, in the order of their worth, and the plan's figures for them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from recipes.compose.recipe import compose_recipe
from recipes.config import Bench, Recipe
from recipes.errors import ConfigError
from recipes.plan import planner
from recipes.plan.planner import RunPlan
from recipes.plan.search import Sequences
from recipes.schedule import lengths

# Qwen3's smaller models (their config.json), with Qwen3-4B's vocabulary, heads' size and YaRN.
_SMALL = "model.heads=16 model.layers=28"
SHAPES = {
    "4B": "",
    "1.7B": f"{_SMALL} model.hidden=2048 model.ffn=6144",
    "0.6B": f"{_SMALL} model.hidden=1024 model.ffn=3072",
}
PACK = 155_648  # most tokens of a LIMI-like pack
SIDES = ("roofline", "ours", "theirs")
PROFILE = "profile"  # a further side: one step of ours under PyTorch's profiler
# Estimates by which a call decides whether it has time for another measurement.
START_S = 30.0  # for starting a process, its weights, and compiling
SLOWER = 1.6  # ratio of transformers' step time to ours
PIN_S_PER_GB = 0.6
_ROOFLINE_S = 15.0


@dataclass(frozen=True)
class Published:
    """What others measured at the same shape."""

    tokens_s: float  # per GPU
    where: str
    source: str


@dataclass(frozen=True)
class Case:
    """A row of the table.

    sequences: tokens of each sequence of a step. steps: the number of timed steps. words: overrides of the recipe, in addition to
    those of all rows.
    """

    shape: str
    label: str
    sequences: tuple[int, ...]
    steps: int = 2
    words: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.shape}, {self.label}"

    @property
    def key(self) -> str:
        """The row's name on a command line, and of its folder."""
        return f"{self.shape}-{self.label}".replace(" ", "-")

    @property
    def tokens(self) -> int:
        """The tokens of a step."""
        return sum(self.sequences)


def _pack() -> tuple[int, ...]:
    """Return as many randomly drawn LIMI lengths as fit into a pack."""
    drawn = lengths.drawn(lengths.COUNT, 0)
    return tuple(n for n, end in zip(drawn, accumulate(drawn), strict=True) if end <= PACK)


# All lengths have about as many tokens per step.
CASES = (
    Case("4B", "32k", (32_768,) * 4),
    Case("4B", "8k", (8_192,) * 16),
    Case("4B", "152k", (PACK,), steps=1),
    Case("4B", "16k", (16_384,) * 8),
    Case("0.6B", "16k", (16_384,) * 8),
    Case("4B", "LIMI-like pack", _pack(), words=(f"layout.max_tokens_per_gpu={PACK}",)),
    Case("4B", "64k", (65_536,) * 2),
    Case("4B", "128k", (131_072,), steps=1),
    Case("1.7B", "32k", (32_768,) * 4),
    Case("0.6B", "32k", (32_768,) * 4),
)
_PRIME = "prime-rl's committed baselines"
PUBLISHED = {
    "0.6B-16k": Published(25_486, "one H100", _PRIME),
    "4B-16k": Published(53_142 / 8, "each of eight H200", _PRIME),
}


def chosen_cases(bench: Bench, cases: Sequence[Case] = CASES) -> list[Case]:
    """Return the rows that the recipe names, with its number of steps. Raise `ConfigError` for an unknown row or side."""
    by_key = {case.key: case for case in cases}
    keys = bench.rows.split(",") if bench.rows else [*by_key]
    for key in keys:
        if key not in by_key:
            raise ConfigError(f"bench.rows={bench.rows}: there is no row '{key}'", f"the rows are {', '.join(by_key)}")
    for side in chosen_sides(bench):
        if side not in (*SIDES, PROFILE):
            known = ", ".join((*SIDES, PROFILE))
            raise ConfigError(f"bench.sides={bench.sides}: there is no side '{side}'", f"the sides are {known}")
    if bench.steps is not None and bench.steps < 1:
        raise ConfigError(f"bench.steps={bench.steps} is below 1", "write bench.steps=1")
    return [replace(by_key[key], steps=bench.steps or by_key[key].steps) for key in keys]


def chosen_sides(bench: Bench) -> tuple[str, ...]:
    """Return the sides that the recipe names."""
    return tuple(bench.sides.split(",")) if bench.sides else SIDES


@dataclass(frozen=True)
class Planned:
    """A case with its plan on a machine."""

    case: Case
    plan: RunPlan

    @property
    def recipe(self) -> Recipe:
        return self.plan.recipe

    @property
    def batches(self) -> list[list[int]]:
        """The sequence lengths of each micro-batch of a step."""
        return [[self.case.sequences[s] for s in batch] for batch in self.plan.schedule.step(0).ranks[0]]

    @property
    def allocated(self) -> float:
        """The planned peak bytes of tensors; PyTorch's `max_memory_allocated` counts the same."""
        return self.plan.memory[0].allocated

    @cached_property
    def step_seconds(self) -> float:
        """The planned seconds of a step."""
        return sum(self.plan.step_seconds[0].values())

    def part_seconds(self, side: str) -> float:
        """Return the approximate seconds that measuring a side takes."""
        if side == "roofline":
            return _ROOFLINE_S + 0.3 * self.step_seconds
        if side == "theirs":
            return START_S + self.case.steps * SLOWER * self.step_seconds
        host = self.plan.host
        pinned = (host.optimizer + host.activations) / 1e9
        return START_S + PIN_S_PER_GB * pinned + (1 if side == PROFILE else self.case.steps) * self.step_seconds


def planned(case: Case, words: Sequence[str]) -> Planned:
    """Plan a case with the layout that the search finds. words: overrides of the machine and the layout.

    Raise `ConfigError` if the case does not fit.
    """
    count = len(case.sequences)
    of_case = ["model=qwen3-4b", *SHAPES[case.shape].split(), *case.words, f"run={case.key}"]
    steps = [f"optim.batch_size={count}", f"optim.epochs={case.steps}", "optim.copies=1"]
    recipe = compose_recipe([*of_case, *steps, "engine=megatron", *words])
    return Planned(case, planner.make_plan(recipe, Sequences(range(count), case.sequences, "drawn at random")))
