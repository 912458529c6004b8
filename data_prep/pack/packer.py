"""From one record of a source to its proved sequences, or to the reason why it has none."""

import bisect
from pathlib import Path
from typing import Any

from data_prep.pack import trajectory_options
from data_prep.records import Record
from data_prep.sources import Source, source, trajectory
from data_prep.text.chat import Chat, load_tokenizer
from data_prep.text.sequences import Conversation, Packed
from data_prep.trajectory import Code, Rejected, Trajectory
from recipes.config import Data, Recipe, TooLong


class Packer:
    """Packs single records: one in every worker."""

    def __init__(self, recipe: Recipe) -> None:
        self.options: Data = recipe.data
        self.source: Source = source(recipe.data.source)
        self.chat = Chat(load_tokenizer(Path(recipe.model.checkpoint)), recipe.model.family)

    def pack(self, record: Record) -> Packed:
        """The record's ledger line and sequences; what is wrong with a record is in the line, never raised."""
        ledger: dict[str, Any] = {"record": record.place, "id": None, "status": "kept"}
        try:
            said = trajectory(record, self.source)
            content = said.content_hash()
            ledger |= {"id": said.id, "content": content}
            said = trajectory_options.without_thinking(said, self.options)
            said = trajectory_options.without_special_tokens(said, self.chat.special, self.options)
            turns, faults = trajectory_options.supervised(said, self.options)
            ledger |= {"schema_breaks": faults} if faults else {}
            conversations, left_out = self._fitting(said, turns)
            ledger |= {"repairs": said.repairs + left_out, **_worth_knowing(said)}
        except Rejected as error:
            rejected = {"status": "rejected", "code": error.code.value, "reason": str(error)}
            return Packed(ledger | rejected | {"id": ledger["id"] or error.identity})
        encoded = [e for _, sequences in conversations for e in sequences]
        begins = [e.begins for e in encoded]
        ledger |= {
            "tokens": sum(len(e.tokens) for e in encoded),
            "supervised": sum(t.end - t.start for e in encoded for t in e.turns),
            "turns": len(turns),
            "segments": len(encoded),
        }
        ledger |= {f"segments_by_{why}": begins.count(why) for why in ("history", "tokens") if why in begins}
        ledger |= {"pieces": len(conversations)} if len(conversations) > 1 else {}
        return Packed(ledger, conversations)

    def _fitting(self, said: Trajectory, turns: list[int]) -> tuple[list[Conversation], list[str]]:
        """The whole conversation, or its pieces where it is too long and may be cut; and what the cutting left out."""
        encoded = self.chat.encode(said, turns, self.options.thinking)
        limit = self.options.max_tokens
        longest = max(len(e.tokens) for e in encoded)
        if longest <= limit:
            return [(said, encoded)], []
        if self.options.too_long is TooLong.reject:
            raise Rejected(
                Code.too_long,
                f"{longest:,} tokens, over data.max_tokens={limit}",
                f"write data.max_tokens={longest}, or data.too_long=split to cut it before user messages",
            )
        return self._cut(said, turns, limit)

    def _cut(self, said: Trajectory, turns: list[int], limit: int) -> tuple[list[Conversation], list[str]]:
        cut = trajectory_options.pieces(said)
        head = [*range(cut[0][0])]
        found: list[Conversation] = []
        left_out: list[str] = []

        def longest(pieces: list[list[int]]) -> int:
            return max((len(e.tokens) for e in self._part(said, turns, head, pieces)[1]), default=0)

        def leave_out(pieces: list[list[int]]) -> None:
            if pieces:
                left_out.append(
                    f"messages {pieces[0][0]} to {pieces[-1][-1]}, none supervised, left out by the cutting"
                )

        while first := next((n for n, piece in enumerate(cut, 1) if {*turns} & {*piece}), 0):
            # As much as fits before the next supervised turn, then as much as fits after it: tokens grow with messages.
            drop = bisect.bisect_left(range(first), True, key=lambda n: longest(cut[n:first]) <= limit)
            if drop == first:
                length = longest(cut[first - 1 : first])
                raise Rejected(
                    Code.too_long,
                    f"from message {cut[first - 1][0]} to the next user message it has {length:,} tokens, over "
                    f"data.max_tokens={limit}, and is cut before user messages only",
                    f"write data.max_tokens={length}",
                )
            leave_out(cut[:drop])
            cut = cut[drop:]
            count = bisect.bisect_left(range(len(cut)), True, key=lambda n: longest(cut[: n + 1]) > limit)
            found.append(self._part(said, turns, head, cut[:count]))
            cut = cut[count:]
        leave_out(cut)
        return found, left_out

    def _part(self, said: Trajectory, turns: list[int], head: list[int], pieces: list[list[int]]) -> Conversation:
        """The pieces as a conversation of their own, with its sequences."""
        kept = [*head, *(k for piece in pieces for k in piece)]
        wanted = [n for n, k in enumerate(kept) if k in turns]
        part = said.model_copy(update={"messages": [said.messages[k] for k in kept]})
        return part, self.chat.encode(part, wanted, self.options.thinking) if wanted else []


def _worth_knowing(said: Trajectory) -> dict[str, int]:
    """For the ledger: messages that no turn comes after, and turns whose results come in another order than their calls,
    which a template that shows no ids does not tell."""
    last = said.assistant_turns()[-1]
    reordered = 0
    for k, m in enumerate(said.messages):
        calls = [c.id for c in m.tool_calls or []]
        results = [r.tool_call_id for r in said.messages[k + 1 : k + 1 + len(calls)]]
        reordered += bool(calls) and len(results) == len(calls) and calls != results
    found = {"messages_after_the_last_turn": len(said.messages) - 1 - last, "turns_with_results_reordered": reordered}
    return {name: count for name, count in found.items() if count}
