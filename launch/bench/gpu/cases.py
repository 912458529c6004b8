"""What `make bench-gpu` trains, in which order, and what the plan says of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from recipes.compose.recipe import compose_recipe
from recipes.config import Recipe
from recipes.plan import planner
from recipes.plan.planner import RunPlan
from recipes.plan.published import calibration
from recipes.plan.search import Sequences
from recipes.schedule import lengths

# Qwen3's smaller models (their config.json), with Qwen3-4B's vocabulary, heads' size and YaRN.
_SMALL = "model.heads=16 model.layers=28"
SHAPES = {
    "4B": "",
    "1.7B": f"{_SMALL} model.hidden=2048 model.ffn=6144",
    "0.6B": f"{_SMALL} model.hidden=1024 model.ffn=3072",
}
PACK = 155_648  # tokens that a LIMI-like pack holds at most
PARTS = ("roofline", "ours", "transformers")
BAND = 6e-3  # nats that bf16 may move the loss (`make parity`)
# Allowances, by which a call decides what still fits into it.
START_S = 60.0  # a process, its weights, and compiling
SLOWER = 1.6  # transformers' step over ours
_ROOFLINE_S = 30.0


@dataclass(frozen=True)
class Case:
    """A row. sequences: tokens of those of a step. steps: that are timed. words: of the recipe, beside those of all rows. parts:
    what is measured, each in a process of its own."""

    shape: str
    label: str
    sequences: tuple[int, ...]
    steps: int = 2
    words: tuple[str, ...] = ()
    parts: tuple[str, ...] = PARTS

    @property
    def name(self) -> str:
        return f"{self.shape}, {self.label}"

    @property
    def key(self) -> str:
        """Name of its folder."""
        return self.name.replace(", ", "-").replace(" ", "-")

    @property
    def tokens(self) -> int:
        """Of a step."""
        return sum(self.sequences)


def _pack() -> tuple[int, ...]:
    """As many of LIMI's lengths, drawn at random, as a pack holds."""
    drawn = lengths.drawn(lengths.COUNT, 0)
    return tuple(n for n, end in zip(drawn, accumulate(drawn), strict=True) if end <= PACK)


# A step has about as many tokens whatever the length; what says most comes first.
CASES = (
    Case("4B", "32k", (32_768,) * 4),
    Case("4B", "152k", (PACK,)),
    Case("4B", "8k", (8_192,) * 16),
    Case("4B", "LIMI-like pack", _pack(), words=(f"layout.max_tokens_per_gpu={PACK}",)),
    Case("4B", "64k", (65_536,) * 2),
    Case("4B", "128k", (131_072,)),
    Case("1.7B", "32k", (32_768,) * 4),
    Case("0.6B", "32k", (32_768,) * 4),
    Case("0.6B", "1k beside the CPU", (1024,), steps=1, parts=("ours", "cpu")),
)


@dataclass(frozen=True)
class Planned:
    """A case on a machine."""

    case: Case
    plan: RunPlan

    @property
    def recipe(self) -> Recipe:
        return self.plan.recipe

    @property
    def batches(self) -> list[list[int]]:
        """Lengths of the sequences of each micro-batch of a step."""
        return [[self.case.sequences[s] for s in batch] for batch in self.plan.schedule.step(0).ranks[0]]

    @property
    def allocated(self) -> float:
        """Bytes that tensors take at most, by the plan; PyTorch's `max_memory_allocated` counts the same."""
        return self.plan.memory[0].allocated

    @cached_property
    def step_seconds(self) -> float:
        """By the plan, before any calibration by what was published."""
        return sum(self.plan.step_seconds[0].values()) * calibration(self.recipe.gpu).factor

    def part_seconds(self, part: str) -> float:
        """About how long measuring a part takes."""
        if part == "roofline":
            return _ROOFLINE_S + 0.3 * self.step_seconds
        if part == "transformers":
            return START_S + self.case.steps * SLOWER * self.step_seconds
        return START_S + (self.case.steps + self.recipe.layout.offload) * self.step_seconds


def planned(case: Case, words: Sequence[str]) -> Planned:
    """With the layout that the search finds. words: of the machine and the layout. Raises `ConfigError` where it does not fit."""
    count = len(case.sequences)
    of_case = ["model=qwen3-4b", *SHAPES[case.shape].split(), *case.words, f"run={case.key}"]
    steps = [f"optim.batch_size={count}", f"optim.epochs={case.steps}", "optim.copies=1"]
    recipe = compose_recipe([*of_case, *steps, "engine=megatron", *words])
    return Planned(case, planner.plan(recipe, Sequences(range(count), case.sequences, "drawn at random")))
