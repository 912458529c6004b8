"""What a record becomes: sequences with their supervised turns. Apart from the code that makes them, which takes seconds to
import: the process that writes what its workers made does not need it."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_prep.trajectory import Trajectory


@dataclass(frozen=True)
class Turn:
    """A supervised assistant turn: `tokens[start:end]` of its sequence, the stop token included.

    message: its number in the trajectory. prompt: tokens of the prompt that inference sends for it; `start` is later
    where thinking is shown without being supervised.
    """

    message: int
    prompt: int
    start: int
    end: int


@dataclass(frozen=True)
class Encoded:
    """One training sequence, [n] int32 tokens that end with the last turn's stop token.

    begins: why it does not go on from the sequence before it: `first`, `history` (the template shows what was said
    otherwise in later prompts) or `tokens` (what was said and the prompt are joined in one token there).
    """

    tokens: np.ndarray
    turns: list[Turn]
    begins: str


Conversation = tuple[Trajectory, list[Encoded]]


@dataclass
class Packed:
    """What became of one record: a line of the ledger, and the sequences of every conversation it was kept as."""

    ledger: dict[str, Any]
    conversations: list[Conversation] = field(default_factory=list)
