"""Encode a trajectory as exact training text: its tokens, its supervised tokens, and the proof that both are correct.

A supervised token is correct if the text before it is exactly what inference sends plus what the model itself generated.
For every supervised turn k, the tokens before the turn equal the tokenised output of
`apply_chat_template(messages[:k], tools, add_generation_prompt=True)`. The turn itself is the template's rendering of
message k as the last message, up to and including its stop token.

Consecutive turns share a sequence while the prompt plus the generated turn is an unchanged prefix of the next prompt.
Otherwise a new sequence starts with the next prompt. This happens, for example, when a template omits the reasoning of
earlier user turns. Every turn is therefore supervised exactly once, for any treatment of history by the template.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from data_prep.text.sequences import Encoded, Turn
from data_prep.text.template import ChatTemplate
from data_prep.trajectory import Code, Message, Rejected, Trajectory
from recipes.checkpoint.checkpoint_config import AGAIN
from recipes.config import Family, Thinking
from recipes.errors import DataError
from recipes.families import facts


class Chat:
    """Render and tokenise trajectories with one tokenizer and its chat template, and prove their prompts to be those of inference."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, family: Family, options: Mapping[str, str] | None = None
    ) -> None:
        """options: `model.template_options`."""
        self.tokenizer = tokenizer
        self.family = facts(family).chat
        self.template = ChatTemplate(tokenizer, options)
        self.special = sorted((str(t) for t in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        edges = {*self.family.roles, *self.family.stops}
        if missing := sorted((edges | {*self.family.think}) - {*self.special}):
            raise DataError(
                f"the tokenizer has no special token {', '.join(missing)}, which model.family={family.value} needs",
                "write MODEL=NAME of the checkpoint's own family",
            )
        vocabulary = tokenizer.get_vocab()
        ids = {t: vocabulary[t] for t in edges}
        self.stop_ids = frozenset(ids[t] for t in self.family.stops)
        self._edge = re.compile("|".join(map(re.escape, sorted(edges))))
        self._edge_ids = np.array(sorted(ids.values()))
        self._think_end = vocabulary[self.family.think[1]]
        self._check_special_tokens_split_text(edges)
        self._opening = self._assistant_opening()
        self._opening_ids = self.tokenise(self._opening)
        self._role = next(t for t in self.family.roles if self._opening.startswith(t))
        self._role_id = ids[self._role]
        _, begins, thought = self._opening.rpartition(self.family.think[0])
        self._opens_thought = bool(begins) and self.family.think[1] not in thought

    def tokenise(self, text: str) -> np.ndarray:
        """Return the [n] int32 tokens of the text; special tokens in the text become single tokens."""
        # The fast call returns no offsets. None are needed: special tokens align text and tokens.
        (encoding,) = self.tokenizer.backend_tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.array(encoding.ids, dtype=np.int32)

    def prompt(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
        """Return the text that inference sends for the next assistant turn after `messages`."""
        return self.template.render(messages, tools, prompt=True)

    def encode(
        self, trajectory: Trajectory, supervised: list[int], thinking: Thinking = Thinking.supervise
    ) -> list[Encoded]:
        """Return proved sequences in which every message of `supervised` is a turn.

        supervised: indices of assistant messages, ascending. Message content must contain none of the tokens in `special`.
        Raise `Rejected` if the template fails or omits part of an assistant message.
        """
        self.template.forget()
        messages, tools = trajectory.chat(), trajectory.tools
        sequences: list[Encoded] = []
        turns: list[tuple[int, int]] = []  # of the current sequence: (message, length of its prompt's text)
        before, begins = "", "first"
        for k in supervised:
            prompt = self.prompt(messages[:k], tools)
            if not prompt.endswith(self._opening):
                raise Rejected(Code.template, f"message {k}: its prompt does not end with {self._opening!r}")
            if self._opens_thought and not messages[k].get("reasoning_content"):
                raise Rejected(
                    Code.template,
                    f"message {k} has no reasoning, and the template's prompt opens a thought: it would learn not to think",
                    "write data.thinking=supervise or context" if thinking is Thinking.drop else "write weight 0 at it",
                )
            if turns and not self._continues(prompt, before, messages[turns[-1][0]]):
                sequences += self._sequences(trajectory, messages, before, turns, begins, thinking)
                turns, begins = [], "history"
            turns.append((k, len(prompt)))
            before = prompt
        return sequences + self._sequences(trajectory, messages, before, turns, begins, thinking)

    def _continues(self, prompt: str, before: str, message: dict[str, Any]) -> bool:
        """Return whether `prompt` starts with the prompt `before` plus `message` as generated, stop token included."""
        if not prompt.startswith(before):
            return False
        edge = self._edge.search(prompt, len(before))
        if edge is None or edge[0] not in self.family.stops:
            return False
        turn = prompt[len(before) : edge.start()]
        return turn == self._without_empty_thought(turn, message) and self._left_out(message, turn) is None

    def _without_empty_thought(self, turn: str, message: dict[str, Any]) -> str:
        return turn if message.get("reasoning_content") else turn.removeprefix(self.family.empty_thought)

    def _sequences(
        self, trajectory: Trajectory, messages: list[dict[str, Any]], prompt: str, turns: list[tuple[int, int]], begins: str,
        thinking: Thinking,
    ) -> list[Encoded]:  # fmt: skip
        """Return the sequences of turns whose prompts are all prefixes of the last turn's `prompt`: usually one sequence holds them.

        It takes several if the tokenizer merges text across the end of a prompt.
        """
        last = turns[-1][0]
        text = prompt + self._turn_text(messages[: last + 1], trajectory.tools)
        tokens = self.tokenise(text)
        roles = np.flatnonzero(tokens == self._role_id)
        edges = np.flatnonzero(np.isin(tokens, self._edge_ids))
        number = {at.start(): i for i, at in enumerate(re.finditer(re.escape(self._role), text))}
        if len(number) != len(roles):
            raise Rejected(
                Code.template, f"{self._role} is {len(number)} times in the text, {len(roles)} in its tokens"
            )
        encoded: list[Encoded] = []
        pending: list[Turn] = []
        for k, length in turns:
            edge = self._edge.search(text, length)
            assert edge is not None, "every turn ends with a stop token"
            turn, message = text[length : edge.end()], trajectory.messages[k]
            opening = roles[number[length - len(self._opening)]]
            start = int(opening) + len(self._opening_ids)
            if np.array_equal(tokens[opening:start], self._opening_ids):
                end = int(edges[np.searchsorted(edges, start)]) + 1
                pending += self._spans(self._turn(k, tokens, start, end, thinking), tokens, turn, message)
                continue
            # The turn's text merges into the opening's last token. Inference sends the opening's own tokens, so this turn
            # ends its sequence. Later prompts contain the merged token, as inference will send it.
            own = np.concatenate((tokens[:opening], self._opening_ids, self.tokenise(turn)))
            pending += self._spans(self._turn(k, own, start, len(own), thinking), own, turn, message)
            encoded.append(Encoded(own, pending, begins))
            pending, begins = [], "tokens"
        if pending:
            encoded.append(Encoded(tokens[: pending[-1].end], pending, begins))
        return encoded

    def _turn_text(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
        """Return the text of the last message after its prompt, up to and including its stop token."""
        k, message = len(messages) - 1, messages[-1]
        # Content contains no role token, so the last opening belongs to this turn.
        _, opening, turn = self.template.render(messages, tools).rpartition(self._opening)
        if not opening:
            raise Rejected(Code.template, f"message {k}: the template does not open it with {self._opening!r}")
        turn = self._without_empty_thought(turn, message)
        if not self._edge.search(turn):
            turn += self.family.closing_calls if "tool_calls" in message else self.family.closing
        edge = self._edge.search(turn)
        if edge is None or edge[0] not in self.family.stops:
            raise Rejected(
                Code.template, f"message {k}: the template does not end the turn with {' or '.join(self.family.stops)}"
            )
        if missing := self._left_out(message, turn[: edge.start()]):
            advice = "; write data.thinking=drop to leave it out" if missing == "reasoning" else ""
            raise Rejected(Code.template, f"message {k}: the chat template leaves out its {missing}{advice}")
        return turn[: edge.end()]

    def _spans(self, whole: Turn, tokens: np.ndarray, turn: str, message: Message) -> list[Turn]:
        """Return the turn as its supervised spans: one, or several if characters of its content are not learned.

        A token is left out if any of its characters is. turn: the turn's text. Raise `Rejected` if its tokens do not show where its
        characters are.
        """
        if not message.unsupervised:
            return [whole]
        offsets = self._offsets(turn, tokens[whole.prompt : whole.end])
        if offsets is None:
            raise Rejected(
                Code.template, f"message {whole.message}: the tokens of its unsupervised characters cannot be told"
            )
        content = message.content.strip()
        rest = turn.partition(self.family.think[1])[2] or turn
        first = len(turn) - len(rest.lstrip())
        shift = first - (len(message.content) - len(message.content.lstrip()))
        left_out = [(max(a + shift, first), min(b + shift, first + len(content))) for a, b in message.unsupervised]
        learned = [at >= whole.start for at in range(whole.prompt, whole.end)]
        for at, (begin, end) in enumerate(offsets):
            learned[at] &= not any(begin < b and a < end for a, b in left_out)
        edges = np.flatnonzero(np.diff([False, *learned, False])) + whole.prompt
        return [Turn(whole.message, whole.prompt, int(a), int(b)) for a, b in edges.reshape(-1, 2)]

    def _offsets(self, turn: str, tokens: np.ndarray) -> list[tuple[int, int]] | None:
        """Return [start, end) characters of every token of a turn's text; None if it is tokenised otherwise alone."""
        for before in (self._opening, ""):
            found = self.tokenizer.backend_tokenizer.encode(before + turn, add_special_tokens=False)
            if np.array_equal(found.ids[-len(tokens) :], tokens):
                return [(a - len(before), b - len(before)) for a, b in found.offsets[-len(tokens) :]]
        return None

    def _left_out(self, message: dict[str, Any], text: str) -> str | None:
        """Return the part of an assistant message that is missing from its turn's text, or None.

        text: the text between the turn's prompt and its stop token. Content contains no thinking tokens, so they split the
        turn exactly. A substring search could match in the wrong part.
        """
        begins, ends = self.family.think
        shown, end, rest = text.partition(ends)
        thought = (shown if self._opens_thought else shown.partition(begins)[2]).strip() if end else ""
        if thought != message.get("reasoning_content", "").strip():
            return "reasoning"
        body, content = (rest if end else text).lstrip(), message["content"].strip()
        if not body.startswith(content):
            return "content"
        calls = body[len(content) :]
        return "tool calls" if any(c["function"]["name"] not in calls for c in message.get("tool_calls", [])) else None

    def _turn(self, k: int, tokens: np.ndarray, start: int, end: int, thinking: Thinking) -> Turn:
        if start == 0:
            raise Rejected(
                Code.position_zero, f"message {k}: its first token is supervised, but nothing comes before it"
            )
        if tokens[end - 1] not in self.stop_ids:
            raise Rejected(Code.template, f"message {k}: no stop token ({' or '.join(self.family.stops)}) after it")
        thought = np.flatnonzero(tokens[start:end] == self._think_end)
        supervised = start + int(thought[0]) + 1 if thinking is Thinking.context and len(thought) else start
        return Turn(k, start, supervised, end)

    def _assistant_opening(self) -> str:
        """Return the text that every prompt ends with: the opening of the assistant turn."""
        messages = [{"role": "user", "content": "a"}]
        try:
            history, prompt = self.template.render(messages, []), self.prompt(messages, [])
        except Rejected as error:
            raise DataError(f"'{self.template.name}': {error.problem}", AGAIN) from error
        opening = prompt.removeprefix(history)
        if not prompt.startswith(history) or not opening.startswith(self.family.roles):
            raise DataError(
                f"the chat template's generation prompt is {prompt!r} after {history!r}: it does not open a turn with "
                f"{' or '.join(self.family.roles)}"
            )
        return opening

    def _check_special_tokens_split_text(self, tokens: set[str]) -> None:
        """Raise `DataError` unless text on each side of a special token is tokenised as if it stood alone.

        The proof needs this to align the text and the tokens of prompts.
        """
        for token in tokens:
            alone = [self.tokenise(part) for part in ("a b ", token, " c\n")]
            if not np.array_equal(self.tokenise(f"a b {token} c\n"), np.concatenate(alone)) or len(alone[1]) != 1:
                raise DataError(f"the tokenizer does not split text at {token}", "its prompts cannot be proved")
