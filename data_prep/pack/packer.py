"""Pack one record of a source: return its proved sequences, or the reason for rejecting it."""

import bisect
from pathlib import Path
from typing import Any

from data_prep.given import Given
from data_prep.normalise.record import Joins
from data_prep.pack import trajectory_options
from data_prep.reading import Reading
from data_prep.records import Record
from data_prep.sources import Source, read_trajectory, source
from data_prep.text.chat import Chat
from data_prep.text.sequences import Conversation, Packed
from data_prep.text.tokenizer import load_tokenizer
from data_prep.trajectory import Code, Rejected, Trajectory
from recipes.config import Data, Recipe, TooLong


class Packer:
    """Packer of single records. Every worker has one."""

    def __init__(self, recipe: Recipe) -> None:
        self.options: Data = recipe.data
        self.source: Source = source(recipe.data.source)
        self.chat = Chat(
            load_tokenizer(Path(recipe.model.checkpoint)), recipe.model.family, recipe.model.template_options
        )
        d = recipe.data
        joins = Joins(other=self.chat.template.parts_join())
        self.reading = Reading(joins, d.columns, Given.read(d), d.broken_calls, d.open_calls)

    def pack(self, record: Record) -> Packed:
        """Return the record's ledger line and sequences. A fault in the record goes into the line and is never raised."""
        ledger: dict[str, Any] = {"record": record.place, "id": None, "status": "kept"}
        try:
            conversation = read_trajectory(record, self.source, self.reading)
            content = conversation.content_hash()
            ledger |= {"id": conversation.id, "content": content}
            conversation = trajectory_options.without_thinking(conversation, self.options)
            conversation = trajectory_options.without_special_tokens(conversation, self.chat.special, self.options)
            turns, faults, notes = trajectory_options.supervised(conversation, self.options)
            ledger |= {"schema_breaks": faults} if faults else {}
            conversations, left_out = self._fitting(conversation, turns)
            ledger |= {"repairs": conversation.repairs + notes + left_out, **_extra_counts(conversation)}
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

    def _fitting(self, conversation: Trajectory, turns: list[int]) -> tuple[list[Conversation], list[str]]:
        """Return the whole conversation, or its pieces if it is too long and `data.too_long=split`; and a note per omitted part.

        Raise `Rejected` if it is too long and must not be split.
        """
        encoded = self.chat.encode(conversation, turns, self.options.thinking)
        limit = self.options.max_tokens
        longest = max(len(e.tokens) for e in encoded)
        if longest <= limit:
            return [(conversation, encoded)], []
        if self.options.too_long is TooLong.reject:
            raise Rejected(
                Code.too_long,
                f"{longest:,} tokens, over data.max_tokens={limit}",
                f"write data.max_tokens={longest}, or data.too_long=split to cut it before user messages",
            )
        return self._cut(conversation, turns, limit)

    def _cut(self, conversation: Trajectory, turns: list[int], limit: int) -> tuple[list[Conversation], list[str]]:
        cut = trajectory_options.pieces(conversation)
        head = [*range(cut[0][0])]
        conversations: list[Conversation] = []
        left_out: list[str] = []

        def longest(pieces: list[list[int]]) -> int:
            return max((len(e.tokens) for e in self._part(conversation, turns, head, pieces)[1]), default=0)

        def leave_out(pieces: list[list[int]]) -> None:
            if pieces:
                left_out.append(
                    f"messages {pieces[0][0]} to {pieces[-1][-1]}, none supervised, left out by the cutting"
                )

        while first := next((n for n, piece in enumerate(cut, 1) if {*turns} & {*piece}), 0):
            # Take as much context as fits before the next supervised turn, then as much as fits after it.
            # Bisection is valid: more messages mean more tokens.
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
            conversations.append(self._part(conversation, turns, head, cut[:count]))
            cut = cut[count:]
        leave_out(cut)
        return conversations, left_out

    def _part(
        self, conversation: Trajectory, turns: list[int], head: list[int], pieces: list[list[int]]
    ) -> Conversation:
        """Return the pieces as one separate conversation, with its sequences."""
        included = [*head, *(k for piece in pieces for k in piece)]
        supervised = [n for n, k in enumerate(included) if k in turns]
        part = conversation.model_copy(update={"messages": [conversation.messages[k] for k in included]})
        return part, self.chat.encode(part, supervised, self.options.thinking) if supervised else []


def _extra_counts(conversation: Trajectory) -> dict[str, int]:
    """Return extra counts for the ledger, without zeros.

    They count the messages after the last turn, and the turns whose results come in another order than their calls. A
    template that renders no ids hides the latter.
    """
    last = conversation.assistant_turns()[-1]
    reordered = 0
    for k, m in enumerate(conversation.messages):
        calls = [c.id for c in m.tool_calls or []]
        results = [r.tool_call_id for r in conversation.messages[k + 1 : k + 1 + len(calls)]]
        reordered += bool(calls) and len(results) == len(calls) and calls != results
    counts = {
        "messages_after_the_last_turn": len(conversation.messages) - 1 - last,
        "turns_with_results_reordered": reordered,
        "tools_without_a_usable_schema": len(conversation.unjudged()),
    }
    return {name: count for name, count in counts.items() if count}
