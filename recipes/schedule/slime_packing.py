"""slime's own packing at commit 624b824 (`slime/utils/dp_schedule.py`, its default mode), for recipes that are to be trained as
they were released: first fit in the order sequences arrive, then the fullest batches halved until their number divides by the
ranks, dealt out in turn. A sequence over the cap gets a batch of its own, above it."""

from collections.abc import Sequence

from recipes.errors import ConfigError

Batches = list[list[int]]  # indices of sequences


def first_fit(lengths: Sequence[int], cap: int) -> Batches:
    """Batches of at most `cap` tokens, or of one longer sequence."""
    batches: Batches = []
    for s, length in enumerate(lengths):
        fitting = next((b for b in batches if sum(lengths[i] for i in b) + length <= cap), None)
        if fitting is None:
            batches.append([s])
        else:
            fitting.append(s)
    return batches


def divided(batches: Batches, lengths: Sequence[int], multiple: int) -> Batches:
    """As many batches as a multiple of `multiple`. Raises `ConfigError` where none is left to halve."""
    batches = [[*b] for b in batches]
    while len(batches) % multiple:
        largest = max(batches, key=lambda b: (len(b) > 1, sum(lengths[i] for i in b)))
        if len(largest) == 1:
            raise ConfigError(
                f"a step of {len(lengths)} sequences cannot be dealt to {multiple} data-parallel ranks",
                "give a step more sequences, or train on fewer ranks",
            )
        largest.sort(key=lambda i: -lengths[i])
        halves: Batches = [[], []]
        for s in largest:
            min(halves, key=lambda h: sum(lengths[i] for i in h)).append(s)
        batches.remove(largest)
        batches += halves
    return batches
