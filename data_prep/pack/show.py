"""Show packed sequences message by message, with supervised tokens marked. Only the view shortens long context."""

import html
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_prep.pack.dataset import Dataset
from recipes.compose.kinds import shown
from recipes.compose.names.nearest import nearest
from recipes.config import Recipe
from recipes.errors import ConfigError
from recipes.families import facts

if TYPE_CHECKING:
    # For type checks only: a listing needs no tokenizer, and importing transformers takes seconds.
    from transformers import PreTrainedTokenizerBase

_LISTED = 200  # trajectories in a listing
_HEAD, _TAIL = 60, 30  # tokens shown at each end of a long unsupervised part


@dataclass(frozen=True)
class Block:
    """One message of a sequence, or the template's text before the first one. pieces: (text, supervised, tokens)."""

    title: str
    pieces: list[tuple[str, bool, int]]

    @property
    def supervised(self) -> int:
        return sum(n for _, marked, n in self.pieces if marked)

    @property
    def heading(self) -> str:
        tokens = sum(n for *_, n in self.pieces)
        return f"{self.title}: {tokens:,} tokens" + (f", {self.supervised:,} supervised" if self.supervised else "")


def listing(name: str, data: Dataset) -> Table:
    """Return a table of the trajectories of a data set with their counts."""
    table = Table(title=f"{name}, {data.folder}", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("id", "sequences", "tokens", "supervised", "turns"):
        table.add_column(column, justify="left" if column == "id" else "right", overflow="fold")
    kept = [line for line in data.ledger() if line["status"] == "kept"]
    for line in kept[:_LISTED]:
        table.add_row(shown(line["id"]), *(f"{line[key]:,}" for key in ("segments", "tokens", "supervised", "turns")))
    if len(kept) > _LISTED:
        table.caption = f"and {len(kept) - _LISTED:,} more, in ledger.jsonl"
    return table


def sequences(data: Dataset, recipe: Recipe, console: Console) -> None:
    """Print every sequence of the trajectory `recipe.id`. Supervised text is green, or in brackets without colour."""
    from data_prep.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(Path(recipe.model.checkpoint))
    coloured = console.is_terminal and not console.no_color
    for row, identity in enumerate(data.ids):
        if identity != recipe.id:
            continue
        console.print()
        console.rule(f"{heading(data, row)}", align="left")
        if not coloured:
            console.print(Text("supervised text is in ⟦ ⟧"))
        for block in blocks(data, row, tokenizer, recipe):
            console.print(Text(f"── {block.heading}", "bold cyan" if block.supervised else "cyan"))
            for text, marked in shortened(block, tokenizer):
                text = f"⟦{visible(text)}⟧" if marked and not coloured else visible(text)
                console.print(Text(text, "green" if marked else "bright_black"), end="")
            console.print()


def heading(data: Dataset, row: int) -> str:
    """Return one line about a sequence: id, number, tokens, supervised tokens and turns."""
    total = data.ids.count(data.ids[row])
    return (
        f"{shown(data.ids[row])}, sequence {data.segments[row] + 1} of {total}: {data.lengths[row]:,} tokens, "
        f"{data.supervised[row]:,} supervised in {len({*data.turns[row]})} turns"
    )


def visible(text: str) -> str:
    """Return the text with control and invisible characters escaped, except line breaks and tabs: a terminal would obey them."""
    return "".join(c if c in "\n\t" else shown(c) for c in text)


def blocks(data: Dataset, row: int, tokenizer: "PreTrainedTokenizerBase", recipe: Recipe) -> Iterator[Block]:
    """Yield the messages of a sequence, split at the family's role tokens."""
    family = facts(recipe.model.family).chat
    tokens = data.tokens(row).tolist()
    opening = {tokenizer.convert_tokens_to_ids(t) for t in family.roles}
    spans = data.spans(row)
    marked = [False] * len(tokens)
    turn_at: dict[int, int] = {}
    for number, (start, end) in zip(data.turns[row], spans, strict=True):
        marked[start:end] = [True] * (end - start)
        turn_at[start] = number
    # A stop token can be a role token, as in GLM. It belongs to the turn that it ends and is shown there.
    starts = [i for i, t in enumerate(tokens) if t in opening]
    edges = sorted({0, *(i + 1 if marked[i] else i for i in starts), len(tokens)})
    for begin, end in pairwise(edges):
        pieces: list[tuple[str, bool, int]] = []
        at = begin
        while at < end:
            until = next((i for i in range(at, end) if marked[i] != marked[at]), end)
            pieces.append((str(tokenizer.decode(tokens[at:until])), marked[at], until - at))
            at = until
        message = next((n for start, n in turn_at.items() if begin <= start < end), None)
        title = _role(pieces[0][0] if not marked[begin] else "", tokens, begin, tokenizer)
        yield Block(title if message is None else f"{title}, message {message}", pieces)


def _role(text: str, tokens: list[int], begin: int, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the name of the role.

    It follows the opening token, or is that token's own name. The opening token may be the stop token of the turn before.
    """
    first = str(tokenizer.decode(tokens[begin : begin + 1]))
    before = str(tokenizer.decode(tokens[begin - 1 : begin])) if begin else ""
    if text.startswith("<|im_start|>"):
        return text.removeprefix(first).split("\n", 1)[0]
    name = first if first.startswith("<|") else before
    return name.strip("<|>") or "start"


def shortened(block: Block, tokenizer: "PreTrainedTokenizerBase") -> Iterator[tuple[str, bool]]:
    """Yield (text, supervised) for the block's pieces. A long unsupervised piece is cut to both ends and a note between."""
    for text, marked, count in block.pieces:
        if marked or count <= 2 * (_HEAD + _TAIL):
            yield text, marked
            continue
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        head, tail = (str(tokenizer.decode(part)) for part in (tokens[:_HEAD], tokens[-_TAIL:]))
        yield f"{head} ⋯ {len(tokens) - _HEAD - _TAIL:,} tokens not shown ⋯ {tail}", False


def page(data: Dataset, row: int, tokenizer: "PreTrainedTokenizerBase", recipe: Recipe) -> str:
    """Return the sequence as a collapsed HTML block, with supervised text in `mark`."""
    out = [f"<details><summary>{html.escape(heading(data, row))}</summary>"]
    for block in blocks(data, row, tokenizer, recipe):
        out.append(f"<p class=sub>{html.escape(block.heading)}</p><pre>")
        for text, marked in shortened(block, tokenizer):
            out.append(f"<mark>{html.escape(text)}</mark>" if marked else html.escape(text))
        out.append("</pre>")
    return "".join([*out, "</details>"])


def refuse_unknown(identity: str, packed: dict[str, Dataset]) -> None:
    """Raise `ConfigError` with the nearest id, or with the reason if the record of that id was rejected."""
    for data in packed.values():
        for line in data.ledger():
            if line["id"] == identity:
                raise ConfigError(f"id={identity} was rejected: {line['code']}: {line['reason']}")
    near = nearest(identity, dict.fromkeys(i for data in packed.values() for i in data.ids))
    raise ConfigError(
        f"no trajectory has id={identity}",
        f"the nearest is id={shown(near)}; leave id out for a list" if near else "leave id out for a list",
    )
