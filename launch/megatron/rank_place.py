"""The identity of a rank. It has its own file so that the driver does not import torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A rank's global number, its number on its node (a GPU or a share of the cores), and the address of the rendezvous store."""

    rank: int
    local_rank: int
    host: str
    port: int
