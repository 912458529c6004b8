"""A server's scores of held-out trajectories: the loss of every supervised token, on the exact tokens of the packed data.

The data set's own `input_ids` are sent, never re-rendered text. Several sequences are scored at a time. Together they have no
more tokens than the server's key-value cache holds, so that none waits in the server's queue while its timeout runs.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.pack.dataset import Dataset
from launch.serving.client import AT_ONCE, Client
from recipes.errors import SanityError
from recipes.plan.serving import RESERVED


@dataclass(frozen=True)
class Scores:
    """Scores of a data set. Every array has one entry per supervised token, sequence by sequence.

    fp32: whether the server computes in fp32. nll: nats, float64, NaN if the server returned no number. turn: number of the
    supervised turn in its trajectory, from 1.
    """

    data: Dataset
    fp32: bool
    nll: np.ndarray
    sequence: np.ndarray
    trajectory: np.ndarray
    turn: np.ndarray
    position: np.ndarray  # in the sequence, from 0

    @property
    def lost(self) -> np.ndarray:
        """Indices of the tokens without a finite score."""
        return np.flatnonzero(~np.isfinite(self.nll))

    def place(self, token: int) -> str:
        row = self.sequence[token]
        return f"{_named(self.data, row)}, turn {self.turn[token]}, token {self.position[token]}"


@dataclass(frozen=True)
class _Scored:
    """The part of a sequence to send: all tokens up to the last supervised one. Scores start one token before the first."""

    sequence: int
    positions: np.ndarray  # of its supervised tokens
    turns: np.ndarray

    @property
    def start(self) -> int:
        return int(self.positions[0]) - 1

    @property
    def length(self) -> int:
        return int(self.positions[-1]) + 1


def measure_likelihood(client: Client, data: Dataset, progress: Callable[[], None]) -> Scores:
    """Score every supervised token with the server's current weights. Call `progress` after each sequence.

    Raise `SanityError` if a sequence is longer than the server accepts, or if it does not answer with a score for each token.
    """
    asked = _supervised(data)
    info = client.get("/server_info")
    _refuse_long(data, asked, info)
    nll = _score_all(client, data, asked, info["max_total_num_tokens"], progress)
    sequence = np.repeat([a.sequence for a in asked], [len(a.positions) for a in asked])
    return Scores(
        data,
        info["dtype"] == "float32",
        np.concatenate([nll[a.sequence] for a in asked]),
        sequence,
        np.array(data.trajectory)[sequence],
        np.concatenate([a.turns for a in asked]),
        np.concatenate([a.positions for a in asked]),
    )


def _supervised(data: Dataset) -> list[_Scored]:
    """Return, for each sequence, the positions of its supervised tokens and the number of each one's turn.

    Turns are numbered across the sequences of a trajectory: each turn is supervised in one of them, and they are in order.
    """
    before: Counter[int] = Counter()
    asked = []
    for row, trajectory in enumerate(data.trajectory):
        spans = data.spans(row)
        if spans[0][0] == 0:
            raise SanityError(
                f"{_named(data, row)}: its first token is supervised, but a token without a predecessor has no loss",
                f"remove {data.folder} to re-pack it",
            )
        # A turn has several spans if part of it is not learned.
        _, numbers = np.unique(data.turns[row], return_inverse=True)
        numbers = numbers + 1 + before[trajectory]
        before[trajectory] = int(numbers[-1])
        positions = np.concatenate([np.arange(start, end) for start, end in spans])
        asked.append(_Scored(row, positions, np.repeat(numbers, [end - start for start, end in spans])))
    return asked


def _refuse_long(data: Dataset, asked: Sequence[_Scored], info: dict[str, Any]) -> None:
    """Raise `SanityError` if a sequence is too long for the server.

    SGLang's max_req_input_len is the smaller of context and cache, minus tokens that SGLang reserves; a prompt must be shorter.
    """
    longest = max(asked, key=lambda a: a.length)
    most = info["max_req_input_len"] - 1
    if longest.length > most:
        beyond = sum(a.length > most for a in asked)
        needed = longest.length + RESERVED
        raise SanityError(
            f"{beyond} sequences are too long for this server, which accepts {most:,} tokens with a cache of "
            f"{info['max_total_num_tokens']:,}. The longest, {_named(data, longest.sequence)}, has {longest.length:,} up to its last "
            "supervised token",
            f"start a server with --context-length {needed} and a cache of at least {needed} tokens and write sanity.url=ADDRESS, or "
            f"cut the trajectories: data.max_tokens={most} data.too_long=split",
        )


def _score_all(
    client: Client, data: Dataset, asked: Sequence[_Scored], cache: int, progress: Callable[[], None]
) -> dict[int, np.ndarray]:
    """Return {sequence: nll of its supervised tokens}. The longest sequence goes first, with others that fit into the cache.

    cache: the server's key-value cache, in tokens.
    """
    waiting = sorted(asked, key=lambda a: a.length, reverse=True)
    in_flight: dict[Future[np.ndarray], _Scored] = {}
    nll: dict[int, np.ndarray] = {}
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        while waiting or in_flight:
            free = cache - sum(a.length for a in in_flight.values())
            fits = next((a for a in waiting if a.length <= free), None)
            if fits is not None and len(in_flight) < AT_ONCE:
                waiting.remove(fits)
                in_flight[pool.submit(_score, client, data, fits)] = fits
                continue
            for done in wait(in_flight, return_when=FIRST_COMPLETED).done:
                nll[in_flight.pop(done).sequence] = done.result()
                progress()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after an error, do not wait for requests in flight
    return nll


def _score(client: Client, data: Dataset, one: _Scored) -> np.ndarray:
    tokens = data.tokens(one.sequence)[: one.length]
    answer = client.post(
        "/generate",
        {"input_ids": tokens.tolist(), "sampling_params": {"temperature": 0, "max_new_tokens": 0},
         "return_logprob": True, "logprob_start_len": one.start},
    )  # fmt: skip
    # The first entry belongs to the token at logprob_start_len and is always null; that token is not supervised.
    entries = answer.get("meta_info", {}).get("input_token_logprobs") or []
    if [entry[1] for entry in entries] != tokens[one.start :].tolist():
        raise SanityError(
            f"{_named(data, one.sequence)}: SGLang returned scores of {len(entries)} tokens, which are not the "
            f"{one.length - one.start} tokens that were sent",
            "use the SGLang that constraints.txt names",
        )
    nll = np.array([math.nan if entry[0] is None else -entry[0] for entry in entries])
    return nll[one.positions - one.start]


def _named(data: Dataset, sequence: int) -> str:
    return f"{data.ids[sequence]}, sequence {data.segments[sequence]}"
