"""Exact training text: the tokens of a trajectory, what of them is supervised, and the proof that it is right.

A supervised token is right when everything before it is exactly what inference sends or the model itself has said. For
every supervised turn k the tokens before it equal `apply_chat_template(messages[:k], tools, add_generation_prompt=True)`,
tokenised; the turn is what the template makes of message k when it has just been said, up to and with its stop token.

Turns share a sequence as long as what was said is, unchanged, the beginning of the next prompt. Where it is not, as when a
template leaves out the reasoning of earlier user turns, a new sequence begins with that prompt. So every turn is
supervised exactly once, whatever the template does with its history.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data_prep.source_files import check_tokenizer
from data_prep.text.sequences import Encoded, Turn
from data_prep.text.template import ChatTemplate
from data_prep.trajectory import Code, Rejected, Trajectory
from recipes import json_file
from recipes.checkpoint.checkpoint_config import AGAIN
from recipes.config import Family, Thinking
from recipes.errors import DataError
from recipes.families import facts


def load_tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer and chat template, from its files alone. Raises `DataError` where they are missing or broken."""
    check_tokenizer(checkpoint)
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # broken files make transformers and tokenizers raise anything
        _refuse_broken(checkpoint)
        raise DataError(
            f"no tokenizer can be made of '{checkpoint}': {type(error).__name__}: {error}", AGAIN
        ) from error
    # A tokenizer.json can say to cut every text short, which `tokenizer(text)` overrules each time it is called.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    if not tokenizer.chat_template:
        raise DataError(f"'{checkpoint}' has no chat template", "add its chat_template.jinja")
    return tokenizer


def _refuse_broken(checkpoint: Path) -> None:
    """Raises `DataError` for the first of a tokenizer's files that nobody could read."""
    for name in (
        "config.json",
        "tokenizer_config.json",
        "tokenizer.json",
        "special_tokens_map.json",
        "added_tokens.json",
    ):
        if (checkpoint / name).is_file():
            json_file.read(checkpoint / name, AGAIN, DataError)
    for path in checkpoint.rglob("*.jinja"):
        raw = path.read_bytes()
        try:
            raw.decode()
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            raise DataError(
                f"'{path}' is not UTF-8 in line {line}, and a chat template belongs there", AGAIN
            ) from error


class Chat:
    """Renders, tokenises and proves trajectories with one tokenizer and its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, family: Family) -> None:
        self.tokenizer = tokenizer
        self.family = facts(family).chat
        self.template = ChatTemplate(tokenizer)
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
        self._check_special_tokens_part_text(edges)
        self._opening = self._opening_of_a_turn()
        self._opening_ids = self.tokenise(self._opening)
        self._role = next(t for t in self.family.roles if self._opening.startswith(t))
        self._role_id = ids[self._role]

    def tokenise(self, text: str) -> np.ndarray:
        """[n] int32 tokens of the text, special tokens in it read as such."""
        # Without offsets, which nobody needs: special tokens tie text and tokens together.
        (encoding,) = self.tokenizer.backend_tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.array(encoding.ids, dtype=np.int32)

    def prompt(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
        """The text that inference sends for the next assistant turn after `messages`."""
        return self.template.render(messages, tools, prompt=True)

    def encode(
        self, trajectory: Trajectory, supervised: list[int], thinking: Thinking = Thinking.supervise
    ) -> list[Encoded]:
        """Sequences in which every message of `supervised`, numbers of assistant messages in order, is a turn, proved.

        Content must hold none of `special`. Raises `Rejected` where the template fails or leaves out what was said.
        """
        self.template.forget()
        messages, tools = trajectory.chat(), trajectory.tools
        sequences: list[Encoded] = []
        turns: list[tuple[int, int]] = []  # of the sequence at hand: (message, length of its prompt's text)
        before, begins = "", "first"
        for k in supervised:
            prompt = self.prompt(messages[:k], tools)
            if not prompt.endswith(self._opening):
                raise Rejected(Code.template, f"message {k}: its prompt does not end with {self._opening!r}")
            if turns and not self._continues(prompt, before, messages[turns[-1][0]]):
                sequences += self._sequences(messages, tools, before, turns, begins, thinking)
                turns, begins = [], "history"
            turns.append((k, len(prompt)))
            before = prompt
        return sequences + self._sequences(messages, tools, before, turns, begins, thinking)

    def _continues(self, prompt: str, before: str, message: dict[str, Any]) -> bool:
        """Whether `prompt` begins with the prompt `before` and then `message` as it was said, stop token included."""
        if not prompt.startswith(before):
            return False
        edge = self._edge.search(prompt, len(before))
        if edge is None or edge[0] not in self.family.stops:
            return False
        said = prompt[len(before) : edge.start()]
        return (
            said == self._without_empty_thought(said, message) and _left_out(message, said, self.family.think) is None
        )

    def _without_empty_thought(self, said: str, message: dict[str, Any]) -> str:
        return said if message.get("reasoning_content") else said.removeprefix(self.family.empty_thought)

    def _sequences(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], prompt: str, turns: list[tuple[int, int]],
        begins: str, thinking: Thinking,
    ) -> list[Encoded]:  # fmt: skip
        """The sequence of turns whose prompts all begin the last one's, `prompt`; several, where tokens are joined."""
        last = turns[-1][0]
        text = prompt + self._said(messages[: last + 1], tools)
        tokens = self.tokenise(text)
        roles = np.flatnonzero(tokens == self._role_id)
        edges = np.flatnonzero(np.isin(tokens, self._edge_ids))
        number = {at.start(): i for i, at in enumerate(re.finditer(re.escape(self._role), text))}
        if len(number) != len(roles):
            raise Rejected(
                Code.template, f"{self._role} is {len(number)} times in the text, {len(roles)} in its tokens"
            )
        found: list[Encoded] = []
        held: list[Turn] = []
        for k, length in turns:
            opening = roles[number[length - len(self._opening)]]
            start = int(opening) + len(self._opening_ids)
            if np.array_equal(tokens[opening:start], self._opening_ids):
                end = int(edges[np.searchsorted(edges, start)]) + 1
                held.append(self._turn(k, tokens, start, end, thinking))
                continue
            # The text goes on inside the opening's last token: inference sends the opening's own tokens, so this turn
            # ends its sequence; later prompts hold the joined token, as inference will send it.
            edge = self._edge.search(text, length)
            assert edge is not None, "every turn ends with a stop token"
            own = np.concatenate((tokens[:opening], self._opening_ids, self.tokenise(text[length : edge.end()])))
            held.append(self._turn(k, own, start, len(own), thinking))
            found.append(Encoded(own, held, begins))
            held, begins = [], "tokens"
        if held:
            found.append(Encoded(tokens[: held[-1].end], held, begins))
        return found

    def _said(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
        """The text of the last message after its prompt, with its stop token and nothing more."""
        k, message = len(messages) - 1, messages[-1]
        # Content holds no role token, so the last opening is this turn's.
        _, opening, said = self.template.render(messages, tools).rpartition(self._opening)
        if not opening:
            raise Rejected(Code.template, f"message {k}: the template does not open it with {self._opening!r}")
        said = self._without_empty_thought(said, message)
        if not self._edge.search(said):
            said += self.family.closing_calls if "tool_calls" in message else self.family.closing
        edge = self._edge.search(said)
        if edge is None or edge[0] not in self.family.stops:
            raise Rejected(
                Code.template, f"message {k}: the template does not end the turn with {' or '.join(self.family.stops)}"
            )
        if missing := _left_out(message, said[: edge.start()], self.family.think):
            advice = "; write data.thinking=drop to leave it out" if missing == "reasoning" else ""
            raise Rejected(Code.template, f"message {k}: the chat template leaves out its {missing}{advice}")
        return said[: edge.end()]

    def _turn(self, k: int, tokens: np.ndarray, start: int, end: int, thinking: Thinking) -> Turn:
        if start == 0:
            raise Rejected(
                Code.position_zero, f"message {k}: its first token is supervised, but nothing comes before it"
            )
        if tokens[end - 1] not in self.stop_ids:
            raise Rejected(Code.template, f"message {k}: no stop token ({' or '.join(self.family.stops)}) after it")
        thought = np.flatnonzero(tokens[start:end] == self._think_end)
        said = start + int(thought[0]) + 1 if thinking is Thinking.context and len(thought) else start
        return Turn(k, start, said, end)

    def _opening_of_a_turn(self) -> str:
        """What a prompt ends with: the opening of the assistant's turn."""
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

    def _check_special_tokens_part_text(self, tokens: set[str]) -> None:
        """Text before and after a special token is tokenised as if it stood alone: what ties prompts' text and tokens."""
        for token in tokens:
            alone = [self.tokenise(part) for part in ("a b ", token, " c\n")]
            if not np.array_equal(self.tokenise(f"a b {token} c\n"), np.concatenate(alone)) or len(alone[1]) != 1:
                raise DataError(f"the tokenizer does not part text at {token}", "its prompts cannot be proved")


def _left_out(message: dict[str, Any], said: str, think: tuple[str, str]) -> str | None:
    """What of an assistant message is not in the text of its turn, from after its prompt to before its stop token.

    Content holds no thinking tokens, so they part the turn exactly: a substring would also be found where it is not meant.
    """
    shown, end, rest = said.partition(think[1])
    thought = shown.partition(think[0])[2].strip() if end else ""
    if thought != message.get("reasoning_content", "").strip():
        return "reasoning"
    body, content = (rest if end else said).lstrip(), message["content"].strip()
    if not body.startswith(content):
        return "content"
    calls = body[len(content) :]
    return "tool calls" if any(c["function"]["name"] not in calls for c in message.get("tool_calls", [])) else None
