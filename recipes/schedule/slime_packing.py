"""slime's own packing, for recipes that train exactly as released.

Source: slime at commit 624b824, `slime/utils/dp_schedule.py`, default mode. Sequences are packed first fit in their given order.
Then the fullest batches are halved until the ranks divide their number, and the batches are dealt to the ranks in turn. A
sequence over the cap gets a batch of its own.
"""

from collections.abc import Sequence

from recipes.errors import ConfigError

Batches = list[list[int]]  # indices of sequences


def first_fit(lengths: Sequence[int], cap: int) -> Batches:
    """Return batches of at most `cap` tokens each; a longer sequence is a batch of its own."""
    batches: Batches = []
    for s, length in enumerate(lengths):
        fitting = next((b for b in batches if sum(lengths[i] for i in b) + length <= cap), None)
        if fitting is None:
            batches.append([s])
        else:
            fitting.append(s)
    return batches


def divided(batches: Batches, lengths: Sequence[int], multiple: int) -> Batches:
    """Return the batches, halved until their number is a multiple of `multiple`. Raise `ConfigError` if none can be halved."""
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
