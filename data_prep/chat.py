"""Exact training text: one render of a trajectory, its supervised spans, and the proof that they are right.

A supervised token is right when everything before it is exactly the prompt that inference sends. So the proof of
turn k is literal: the tokens before it equal `apply_chat_template(messages[:k], tools, add_generation_prompt=True)`,
tokenised. A turn ends with its stop token, which is supervised.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data_prep.trajectory import Trajectory
from recipes.config import Family
from recipes.errors import DataError

PROOF = "literal: every supervised turn's prefix equals the tokenised inference prompt"


@dataclass(frozen=True)
class Stops:
    """How a family's chat template ends an assistant turn.

    tokens: the special tokens that end a turn, whichever comes first. closing: text appended to the whole render,
    where the template leaves the last turn without its stop token.
    """

    tokens: tuple[str, ...]
    closing: str = ""


STOPS = {
    Family.qwen3: Stops(("<|im_end|>",)),
    Family.glm4_moe: Stops(("<|user|>", "<|observation|>"), closing="<|user|>"),
}


@dataclass(frozen=True)
class Encoded:
    """One training sequence: `tokens[start:end]` is supervised for every (start, end) of `spans`."""

    tokens: list[int]
    spans: list[tuple[int, int]]


def load_tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer and chat template, from its files alone."""
    if not (checkpoint / "tokenizer.json").is_file():
        raise DataError(
            f"no tokenizer.json in '{checkpoint}'; write model.checkpoint=FOLDER of a Hugging Face checkpoint"
        )
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False, local_files_only=True)
    if not tokenizer.chat_template:
        raise DataError(f"'{checkpoint}' has no chat template; add its chat_template.jinja")
    return tokenizer


class Chat:
    """Renders, tokenises and proves trajectories with one tokenizer and its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, family: Family) -> None:
        self.tokenizer = tokenizer
        self.stops = STOPS[family]
        vocabulary = tokenizer.get_vocab()
        missing = [t for t in self.stops.tokens if t not in vocabulary]
        if missing:
            raise DataError(f"the tokenizer has no token {', '.join(missing)}; model.family={family.value} needs it")
        self.stop_ids = frozenset(vocabulary[t] for t in self.stops.tokens)
        self.special = sorted(str(t) for t in tokenizer.added_tokens_decoder.values())

    def prompt(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
        """The text that inference sends for the next assistant turn after `messages`."""
        return self._render(messages, tools, add_generation_prompt=True)

    def tokenise(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode(self, trajectory: Trajectory) -> Encoded:
        """Tokens and supervised spans of the whole trajectory, each assistant turn proved.

        Raises `DataError` where a turn's prefix is not the prompt that inference sends, where the template drops a
        turn's reasoning, or where content holds one of the tokenizer's special tokens as text.
        """
        messages = trajectory.chat()
        self._refuse_special_tokens(trajectory)
        tokens = self.tokenise(self._render(messages, trajectory.tools) + self.stops.closing)
        spans = []
        for k, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prefix = self.tokenise(self.prompt(messages[:k], trajectory.tools))
            start = len(prefix)
            if tokens[:start] != prefix:
                raise DataError(f"{trajectory.id}: message {k}: {self._difference(tokens, prefix)}")
            end = next((i + 1 for i in range(start, len(tokens)) if tokens[i] in self.stop_ids), None)
            if end is None:
                raise DataError(
                    f"{trajectory.id}: message {k}: no stop token ({' or '.join(self.stops.tokens)}) after it"
                )
            if message.get("reasoning_content", "").strip() not in self.tokenizer.decode(tokens[start:end]):
                raise DataError(
                    f"{trajectory.id}: message {k}: the chat template leaves out its reasoning, as a later user turn follows; "
                    "such a trajectory cannot be one sequence"
                )
            spans.append((start, end))
        if spans[0][0] == 0:
            raise DataError(f"{trajectory.id}: the first token is supervised, but nothing comes before it")
        return Encoded(tokens, spans)

    def _render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], **options: Any) -> str:
        # A list given to the template without tools must be null: templates test `if tools`.
        text: Any = self.tokenizer.apply_chat_template(messages, tools=[*tools] or None, tokenize=False, **options)
        return text

    def _refuse_special_tokens(self, trajectory: Trajectory) -> None:
        for k, message in enumerate(trajectory.messages):
            texts = _texts(message.model_dump(exclude_none=True, exclude={"role"}))
            found = next((t for t in self.special for text in texts if t in text), None)
            if found:
                raise DataError(
                    f"{trajectory.id}: message {k} holds the special token {found} as text, which would become a control "
                    "token; remove it from the data"
                )

    def _difference(self, tokens: list[int], prefix: list[int]) -> str:
        at = next((i for i, (a, b) in enumerate(zip(tokens, prefix, strict=False)) if a != b), len(tokens))
        mine, theirs = (repr(self.tokenizer.decode(t[at : at + 8])) for t in (tokens, prefix))
        return (
            f"the training text differs from the prompt inference sends, first at token {at}: {mine} against {theirs} "
            "(the two renders do not fit together)"
        )


def _texts(value: Any) -> list[str]:
    """Every string in a nested value, keys included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [t for k, v in value.items() for t in (*_texts(k), *_texts(v))]
    if isinstance(value, list):
        return [t for v in value for t in _texts(v)]
    return []
