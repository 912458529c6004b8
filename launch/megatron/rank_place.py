"""Where a rank stands. Its own file, so that the driver need not import torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Its number, its number on its node (a GPU or a share of the cores), and where all ranks meet."""

    rank: int
    local_rank: int
    host: str
    port: int
