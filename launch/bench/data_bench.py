"""`make bench`: the data stage compared with the tokenizer alone, measured in one run on trajectories of LIMI's lengths.

`model.checkpoint=FOLDER` sets the tokenizer. The table includes slime's mask generator and TRL's assistant masks if they can be
imported (`SLIME_ROOT` names a checkout of slime).
"""

import contextlib
import importlib
import importlib.util
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import track

from data_prep.sources import read_trajectories
from data_prep.text.chat import Chat
from data_prep.text.tokenizer import load_tokenizer
from data_prep.trajectory import Trajectory
from recipes.config import Recipe
from recipes.errors import DataError
from recipes.families import facts
from recipes.paths import REPO
from recipes.schedule.lengths import COUNT, LONGEST, SHORTEST

MEAN = 42_400  # tokens of LIMI's trajectories
MOST_MESSAGES = 530
ROUNDS = 3
MANY = 10_000
MANY_TOKENS = 4_200  # tokens of each of the MANY trajectories
STDERR = Console(stderr=True)  # for progress bars: the table on standard output may go to a file
Row = tuple[str, str, str]
CHARACTERS_A_TOKEN = 3.77  # in the text of `records`, with Qwen3's tokenizer


def bench_data(recipe: Recipe, console: Console) -> None:
    """Print the table, each row as soon as it is measured."""
    console.print("| work | measured | to reach |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "limi_like.jsonl"
        _write(source, records(lengths(COUNT), seed=0))
        trajectories = list(read_trajectories(source, "limi"))
        chat = Chat(load_tokenizer(Path(recipe.model.checkpoint)), recipe.model.family, recipe.model.template_options)
        rows = (
            _encoding(_Timed(chat.tokenizer, recipe.model.family), trajectories),
            _command(recipe, source),
            _peers(chat, trajectories),
            _many(recipe, folder),
        )
        for row in itertools.chain(*rows):
            console.print(f"| {' | '.join(row)} |")


def lengths(count: int) -> list[int]:
    """Return the token counts of `count` trajectories, with LIMI's shortest, longest and mean. The quantiles between them follow a
    power law."""
    power = (LONGEST - SHORTEST) / (MEAN - SHORTEST) - 1
    return [round(SHORTEST + (LONGEST - SHORTEST) * (i / (count - 1)) ** power) for i in range(count)]


def records(wanted: list[int], seed: int) -> Iterator[dict[str, Any]]:
    """Yield one record in LIMI's schema per entry of `wanted`, its approximate number of tokens. The text is source code of Python's
    standard library. The number of messages grows with the tokens, from 6 to 530.
    """
    rng = random.Random(seed)
    texts = [p.read_text(encoding="utf-8") for p in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))]
    text = "".join(t for t in texts if "<|" not in t and "think>" not in t and "MASK]" not in t)
    longest = max(wanted)
    for number, tokens in enumerate(wanted):
        messages = 6 + 2 * round((MOST_MESSAGES - 6) / 2 * max(0, tokens - SHORTEST) / max(1, longest - SHORTEST))
        yield _record(number, int(tokens * CHARACTERS_A_TOKEN), messages, text, rng)


def _record(number: int, characters: int, messages: int, text: str, rng: random.Random) -> dict[str, Any]:
    turns = (messages - 4) // 2

    def piece(share: float) -> str:
        """Return this share of a turn's characters, cut from random positions of the text."""
        left, parts = int(share * characters / turns), []
        while left > 0:
            start = rng.randrange(len(text) - 1000)
            parts.append(text[start : start + min(left, 1000)])
            left -= 1000
        return "".join(parts)

    function: dict[str, Any] = {
        "name": "write",
        "description": "Writes a file.",
        "parameters": {
            "type": "object",
            "properties": {"path": {"type": "string"}, "content": {"type": "string"}, "mode": {"type": "integer"}},
            "required": ["path", "content"],
        },
    }
    said: list[dict[str, Any]] = [
        {"role": "system", "content": "You work on files with tools."},
        {"role": "user", "content": f"Task {number}"},
    ]
    for turn in range(turns):
        arguments = {"path": f"src/file_{turn}.py", "content": piece(0.25), "mode": 420}
        call = {"id": f"call_{turn}", "type": "function", "function": {"name": "write", "arguments": arguments}}
        said.append({"role": "assistant", "content": piece(0.1).strip(), "tool_calls": [call]})
        said.append({"role": "tool", "tool_call_id": f"call_{turn}", "content": piece(0.65)})
    said += [{"role": "user", "content": "Sum it up."}, {"role": "assistant", "content": "Done."}]
    return {"id": f"t{number}", "messages": said, "tools": [{"type": "function", "function": function}]}


class _Timed(Chat):
    """A `Chat` that counts the seconds of the proof: rendering the prompts and comparing them."""

    seconds = 0.0

    def prompt(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
        return self._clocked(super().prompt, messages, tools)

    def _continues(self, prompt: str, before: str, message: dict[str, Any]) -> bool:
        return self._clocked(super()._continues, prompt, before, message)

    def _clocked(self, work: Callable[..., Any], *arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            return work(*arguments)
        finally:
            self.seconds += time.perf_counter() - started


def _encoding(chat: _Timed, trajectories: list[Trajectory]) -> Iterator[Row]:
    """Yield ratios of this project's seconds to the tokenizer's, as medians over the rounds. For each trajectory, both are measured
    one after the other."""
    texts = [chat.tokenizer.decode(chat.encode(t, t.assistant_turns())[0].tokens) for t in trajectories]
    longest = max(trajectories, key=lambda t: len(t.messages))
    whole, bare, alone, of_longest, sizes = [], [], [], [], []
    for _ in track(range(ROUNDS), "Encoding", transient=True, console=STDERR, disable=not STDERR.is_terminal):
        ours, proof, tokenizer = 0.0, 0.0, 0.0
        for t, text in zip(trajectories, texts, strict=True):
            started = time.perf_counter()
            chat.tokenizer(text, add_special_tokens=False)
            own = time.perf_counter() - started
            before = chat.seconds
            started = time.perf_counter()
            encoded = chat.encode(t, t.assistant_turns())
            seconds = time.perf_counter() - started
            ours, proof, tokenizer = ours + seconds, proof + chat.seconds - before, tokenizer + own
            if t is longest:
                of_longest.append(seconds / own)
            sizes.append(sum(len(e.tokens) for e in encoded))
        whole.append(ours / tokenizer)
        bare.append((ours - proof) / tokenizer)
        alone.append(tokenizer)
    sizes = sizes[: len(trajectories)]
    shape = f"{len(trajectories)} trajectories of {min(sizes):,} to {max(sizes):,} tokens, mean {sum(sizes) // len(sizes):,}"
    yield from [
        (f"the tokenizer alone: {shape}", f"{statistics.median(alone):.1f} s", "1"),
        ("render + tokens + mask", f"{statistics.median(bare):.2f} × the tokenizer", "at most 1.15 ×"),
        ("the same with the proof of every turn", f"{statistics.median(whole):.2f} × the tokenizer", "at most 2 ×"),
        (
            f"the same, the {len(longest.messages)}-message trajectory",
            f"{statistics.median(of_longest):.2f} ×",
            "at most 4 ×",
        ),
    ]


def _command(recipe: Recipe, source: Path) -> Iterator[Row]:
    """Yield rows for the whole `make data` command: start, read, check, prove, write; then a cache hit. A source with one record
    gives the start's share."""
    single = source.with_name("single.jsonl")
    single.write_text(source.read_text(encoding="utf-8").split("\n", 1)[0] + "\n", encoding="utf-8")
    seconds = {
        (path, workers): _run(recipe, path, source.with_name(f"out{workers}"), workers)[0]
        for workers in (1, 2)
        for path in (single, source)
    }
    one, two = (seconds[source, w] - seconds[single, w] for w in (1, 2))
    yield "`make data`, one process", f"{seconds[source, 1]:.1f} s, {seconds[single, 1]:.1f} s of it the start", ""
    figure = (
        f"{seconds[source, 2]:.1f} s, {seconds[single, 2]:.1f} s of it the start; the rest {one / two:.2f} × as fast"
    )
    yield "`make data`, two processes", figure, "near 2 ×"
    hit = _run(recipe, source, source.with_name("out1"), 1)[0]
    yield "the same again: a cache hit", f"{hit:.2f} s", "under 1 s"


def _run(recipe: Recipe, source: Path, out: Path, workers: int) -> tuple[float, int]:
    """Run the command on a source. Return its seconds, and the peak bytes of all its processes together."""
    model = facts(recipe.model.family).tiny.model
    # A small vocabulary splits the same text into more tokens than LIMI's longest trajectory has.
    words = ["data=limi", f"data.path={source}", f"data.out={out}", f"data.workers={workers}", f"model={model}"]
    words.append("data.max_tokens=1000000")
    command = [sys.executable, "launch/limi.py", "data", *words, f"model.checkpoint={recipe.model.checkpoint}"]
    started = time.perf_counter()
    process = psutil.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL)
    peak = 0
    try:
        while process.poll() is None:
            peak = max(peak, _memory(process))
            time.sleep(0.1)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    if process.returncode:
        raise DataError(f"{' '.join(command)} ended with status {process.returncode}")
    return time.perf_counter() - started, peak


def _memory(process: psutil.Process) -> int:
    """Return the bytes of a process and its descendants. Shared memory is counted once."""
    total = 0
    with contextlib.suppress(psutil.Error):
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += one.memory_full_info().pss
    return total


Masks = tuple[list[int], list[int]]  # tokens, and 1 for each that is supervised, else 0


def _peers(chat: Chat, trajectories: list[Trajectory]) -> Iterator[Row]:
    """Yield a row for each other generator on the same trajectories: its seconds relative to this project's, and how often tokens and
    masks agree."""
    for name, load in (("slime's mask generator", _slime), ("TRL's assistant masks", _trl)):
        generator = load(chat)
        if isinstance(generator, str):
            yield name, f"not measured: {generator}", ""
            continue
        seconds, own, same_tokens, same_mask = 0.0, 0.0, 0, 0
        for t in track(trajectories, name, transient=True, console=STDERR, disable=not STDERR.is_terminal):
            started = time.perf_counter()
            tokens, mask = generator(t)
            between = time.perf_counter()
            encoded = chat.encode(t, t.assistant_turns())
            seconds, own = seconds + between - started, own + time.perf_counter() - between
            ours = [0] * len(encoded[0].tokens)
            for turn in encoded[0].turns:
                ours[turn.start : turn.end] = [1] * (turn.end - turn.start)
            # Ours ends with the last stop token. Text that a template adds after it is never supervised.
            equal = len(encoded) == 1 and tokens[: len(ours)] == encoded[0].tokens.tolist()
            same_tokens += equal
            same_mask += equal and mask == ours + [0] * (len(tokens) - len(ours))
        agreed = f"same tokens {same_tokens}, same mask {same_mask} of {len(trajectories)}"
        yield name, f"{seconds:.1f} s, {seconds / own:.2f} × ours with its proof", agreed


def _slime(chat: Chat) -> Callable[[Trajectory], Masks] | str:
    """Return slime's mask generator, or why it cannot be measured."""
    root = os.environ.get("SLIME_ROOT")
    path = Path(root or "") / "slime" / "utils" / "mask_utils.py"
    if not root or not path.is_file():
        return "SLIME_ROOT names no checkout of slime"
    specification = importlib.util.spec_from_file_location("slime_mask_utils", path)
    assert specification is not None and specification.loader is not None, "a Python file has a loader"
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    generator = module.MultiTurnLossMaskGenerator(chat.tokenizer, tokenizer_type="qwen")
    return lambda t: generator.get_loss_mask(t.chat(), tools=t.tools)


def _trl(chat: Chat) -> Callable[[Trajectory], Masks] | str:
    """Return TRL's mask generator, or why it cannot be measured."""
    if importlib.util.find_spec("trl") is None:
        return "trl cannot be imported"
    utils = importlib.import_module("trl.chat_template_utils")
    try:
        template = utils.get_training_chat_template(chat.tokenizer) or chat.tokenizer.chat_template
    except ValueError:
        return "TRL has no training template for this tokenizer's"

    def masks(t: Trajectory) -> Masks:
        encoded: Any = chat.tokenizer.apply_chat_template(
            t.chat(), tools=[*t.tools], chat_template=template, return_assistant_tokens_mask=True, return_dict=True
        )
        return encoded["input_ids"], encoded["assistant_masks"]

    return masks


def _many(recipe: Recipe, folder: Path) -> Iterator[Row]:
    """Yield the peak memory of the command with all its processes, on all records and relative to a tenth of them."""
    measured = {}
    for count in (MANY // 10, MANY):
        source = folder / f"{count}.jsonl"
        _write(source, records([MANY_TOKENS] * count, seed=1))
        measured[count] = _run(recipe, source, folder / "many", 2)
    (_, few), (seconds, many) = measured[MANY // 10], measured[MANY]
    figure = f"{many / 1e9:.2f} GB, {many / few:.2f} × that of {MANY // 10:,}; {seconds:.0f} s"
    yield f"{MANY:,} trajectories of {MANY_TOKENS:,} tokens, two processes: peak memory", figure, "under 2 GB, flat"


def _write(path: Path, made: Iterator[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for record in made:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
