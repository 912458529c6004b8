"""What a server makes of held-out trajectories: the loss of every supervised token, of the tokens that training would see.

The packed data set's own `input_ids` are sent, never text rendered anew. Several sequences are asked at a time, together no
more tokens than the server's key-value cache holds, so that none waits in the server's queue while its deadline runs.
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
from launch.serving.sglang_command import RESERVED
from recipes.errors import SanityError


@dataclass(frozen=True)
class Scores:
    """One entry for each supervised token in every array, sequence after sequence. fp32: the server computes in it.

    nll: nats, float64, NaN where the server gave no number. turn: of the supervised turns of a trajectory, the first is 1.
    """

    data: Dataset
    fp32: bool
    nll: np.ndarray
    sequence: np.ndarray
    trajectory: np.ndarray
    turn: np.ndarray
    position: np.ndarray  # in the sequence, the first token being 0

    @property
    def lost(self) -> np.ndarray:
        """Numbers of the tokens without a finite score."""
        return np.flatnonzero(~np.isfinite(self.nll))

    def place(self, token: int) -> str:
        row = self.sequence[token]
        return f"{_named(self.data, row)}, turn {self.turn[token]}, token {self.position[token]}"


@dataclass(frozen=True)
class _Scored:
    """What is asked of a sequence: everything up to its last supervised token, scored from the one before the first."""

    sequence: int
    positions: np.ndarray  # of its supervised tokens
    turns: np.ndarray

    @property
    def start(self) -> int:
        return int(self.positions[0]) - 1

    @property
    def length(self) -> int:
        return int(self.positions[-1]) + 1


def measure(client: Client, data: Dataset, progress: Callable[[], None]) -> Scores:
    """Scores every supervised token by the weights the server has now; `progress` is called after each sequence.

    Raises `SanityError` where a sequence is longer than the server takes, and where it answers anything but a score for
    each token sent."""
    asked = _supervised(data)
    info = client.get("/server_info")
    _refuse_long(data, asked, info)
    nll = _asked(client, data, asked, info["max_total_num_tokens"], progress)
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
    """A turn is supervised once, and a trajectory's sequences come in its order: its turns are counted through them all."""
    before: Counter[int] = Counter()
    asked = []
    for row, trajectory in enumerate(data.trajectory):
        spans = data.spans(row)
        if spans[0][0] == 0:
            raise SanityError(
                f"{_named(data, row)}: its first token is supervised, and no loss can be had of what nothing comes before",
                f"remove {data.folder} to pack it again",
            )
        numbers = np.arange(1, len(spans) + 1) + before[trajectory]
        before[trajectory] += len(spans)
        positions = np.concatenate([np.arange(start, end) for start, end in spans])
        asked.append(_Scored(row, positions, np.repeat(numbers, [end - start for start, end in spans])))
    return asked


def _refuse_long(data: Dataset, asked: Sequence[_Scored], info: dict[str, Any]) -> None:
    """max_req_input_len: of the context and the cache the smaller, less what SGLang keeps; a prompt must be shorter."""
    longest = max(asked, key=lambda a: a.length)
    most = info["max_req_input_len"] - 1
    if longest.length > most:
        beyond = sum(a.length > most for a in asked)
        needed = longest.length + RESERVED
        raise SanityError(
            f"{_named(data, longest.sequence)} has {longest.length:,} tokens up to its last supervised one, the longest of "
            f"{beyond} that SGLang cannot score: it takes {most:,}, with a cache of {info['max_total_num_tokens']:,}. Write "
            f"sanity.url=ADDRESS of a server started with --context-length {needed} and a cache of as many tokens, or "
            f"data.max_tokens={most} data.too_long=split to cut the trajectories"
        )


def _asked(
    client: Client, data: Dataset, asked: Sequence[_Scored], cache: int, progress: Callable[[], None]
) -> dict[int, np.ndarray]:
    """{sequence: nll of its supervised tokens}. The longest goes first, and whatever still fits beside it."""
    waiting = sorted(asked, key=lambda a: a.length, reverse=True)
    flying: dict[Future[np.ndarray], _Scored] = {}
    found: dict[int, np.ndarray] = {}
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        while waiting or flying:
            room = cache - sum(a.length for a in flying.values())
            fits = next((a for a in waiting if a.length <= room), None)
            if fits is not None and len(flying) < AT_ONCE:
                waiting.remove(fits)
                flying[pool.submit(_score, client, data, fits)] = fits
                continue
            for done in wait(flying, return_when=FIRST_COMPLETED).done:
                found[flying.pop(done).sequence] = done.result()
                progress()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after an error nobody waits for what is still in flight
    return found


def _score(client: Client, data: Dataset, one: _Scored) -> np.ndarray:
    tokens = data.tokens(one.sequence)[: one.length]
    answer = client.post(
        "/generate",
        {"input_ids": tokens.tolist(), "sampling_params": {"temperature": 0, "max_new_tokens": 0},
         "return_logprob": True, "logprob_start_len": one.start},
    )  # fmt: skip
    # The first entry is of the token at logprob_start_len itself and always null; it is not supervised.
    entries = answer.get("meta_info", {}).get("input_token_logprobs") or []
    if [entry[1] for entry in entries] != tokens[one.start :].tolist():
        raise SanityError(
            f"{_named(data, one.sequence)}: SGLang scored {len(entries)} tokens that are not the {one.length - one.start} "
            "it was sent",
            "use the SGLang that constraints.txt names",
        )
    nll = np.array([math.nan if entry[0] is None else -entry[0] for entry in entries])
    return nll[one.positions - one.start]


def _named(data: Dataset, sequence: int) -> str:
    return f"{data.ids[sequence]}, sequence {data.segments[sequence]}"
