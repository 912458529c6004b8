"""The types of a family's facts: everything that the project does differently for different families."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from recipes.config import Model
from recipes.families.common.parts import Links, Tensors


@dataclass(frozen=True)
class Chat:
    """Facts about the chat format that the chat template does not state."""

    roles: tuple[str, ...]  # special tokens that start a message
    stops: tuple[str, ...]  # special tokens that end an assistant turn
    closing: str = ""  # stop token of a last turn without tool calls, if the template omits it
    closing_calls: str = ""  # stop token of a last turn with tool calls, if the template omits it
    think: tuple[str, str] = ("<think>", "</think>")  # tokens around reasoning
    empty_thought: str = ""  # text that the template inserts only into a last message without reasoning


@dataclass(frozen=True)
class Config:
    """Fields of `config.json` besides those that all families share."""

    architecture: str  # configuration class of transformers
    # Name of a field in config.json: its name in the recipe's model.
    names: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)  # fields with the only value that the engines support
    fixed: dict[str, int] = field(default_factory=dict)  # fields of the recipe's model with the only legal value


@dataclass(frozen=True)
class Router:
    """How the router chooses experts."""

    score_function: str  # Megatron's name of the score function
    expert_bias: bool  # whether a bias, which training does not change, is added for the choice
    pre_softmax: bool  # whether scores are computed before the choice
    bytes_of: Callable[[Model], float]  # bytes per token saved for the backward pass: fp32 scores and maps


@dataclass(frozen=True)
class Parsers:
    """SGLang's parsers for the family."""

    tool_calls: str  # name of the parser of tool calls
    reasoning: str  # name of the parser of reasoning
    always_reasons: bool  # whether the reasoning parser is also correct for a model that does not think


@dataclass(frozen=True)
class Tiny:
    """The tokenizer of the family's tiny model."""

    model: str  # name in hydra_conf/model
    special: tuple[str, ...]  # added tokens
    eos: tuple[str, ...]  # tokens that end an answer, the tokenizer's own first


@dataclass(frozen=True)
class Facts:
    """Everything that is specific to a family."""

    chat: Chat
    config: Config
    links: Callable[[Model], Links]  # every trained parameter, and the router's bias, by global Megatron name
    mtp: Callable[
        [Model], Tensors
    ]  # every tensor of the release's multi-token-prediction layers, which are not trained
    router: Router | None  # None if no model of the family has experts
    parsers: Parsers
    tiny: Tiny
