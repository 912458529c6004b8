"""Result types of packing: sequences with their supervised turns.

They are separate from the encoding code, which takes seconds to import. The process that writes the workers' results does
not need that code.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_prep.trajectory import Trajectory


@dataclass(frozen=True)
class Turn:
    """A supervised span of an assistant turn: `tokens[start:end]` of its sequence.

    A turn is one span, which includes the stop token, or several if part of its text is not learned.

    message: index of the message in the trajectory. prompt: length in tokens of the prompt that inference sends for the
    turn. `start` equals `prompt`, or is larger if thinking is shown but not supervised.
    """

    message: int
    prompt: int
    start: int
    end: int


@dataclass(frozen=True)
class Encoded:
    """One training sequence: [n] int32 tokens that end with the last turn's stop token.

    begins: why a new sequence starts here. `first`: it is the first of its conversation. `history`: the template renders
    an earlier turn differently in later prompts. `tokens`: the tokenizer merges the prompt's end and the turn's start into
    one token.
    """

    tokens: np.ndarray
    turns: list[Turn]
    begins: str


Conversation = tuple[Trajectory, list[Encoded]]


@dataclass
class Packed:
    """Result of packing one record: its ledger line, and its conversations with their sequences (none if rejected)."""

    ledger: dict[str, Any]
    conversations: list[Conversation] = field(default_factory=list)
