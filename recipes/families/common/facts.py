"""What a family of models says of itself: everything that the project does not do alike for all of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from recipes.config import Model
from recipes.families.common.parts import Links, Tensors


@dataclass(frozen=True)
class Chat:
    """What the chat template does not say itself.

    roles: special tokens that open a message. stops: special tokens that end an assistant turn. closing, closing_calls:
    the stop token of a last turn without and with tool calls, where the template leaves it out. think: the tokens around
    reasoning. empty_thought: what the template puts into a last message without reasoning, though neither the prompt nor
    the history has it.
    """

    roles: tuple[str, ...]
    stops: tuple[str, ...]
    closing: str = ""
    closing_calls: str = ""
    think: tuple[str, str] = ("<think>", "</think>")
    empty_thought: str = ""


@dataclass(frozen=True)
class Config:
    """What `config.json` holds beside the fields that all families have.

    architecture: the class of transformers that holds the fields. names: a field's name in config.json, and in the recipe's model.
    constants: fields with the one value that the engines compute. fixed: values of the recipe's model that no other is legal for.
    """

    architecture: str
    names: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    fixed: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Router:
    """How experts are chosen.

    score_function: Megatron's name of it. expert_bias: whether a bias, which training leaves as it is, joins the choice.
    pre_softmax: whether scores are made before the choice. bytes_of: fp32 scores and maps that are kept for the backward pass of
    one token.
    """

    score_function: str
    expert_bias: bool
    pre_softmax: bool
    bytes_of: Callable[[Model], float]


@dataclass(frozen=True)
class Parsers:
    """SGLang's names of its parsers. always_reasons: whether the reasoning parser is right for a model that does not think, too."""

    tool_calls: str
    reasoning: str
    always_reasons: bool


@dataclass(frozen=True)
class Tiny:
    """What the tokenizer of a tiny model has. special: its added tokens. eos: those that end an answer, the tokenizer's own first."""

    model: str  # of hydra_conf/model
    special: tuple[str, ...]
    eos: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """links: every trained parameter, and a router's bias, by its global Megatron name. mtp: every tensor of the release's
    multi-token-prediction layers, which are not trained. router: None where no model of the family has experts."""

    chat: Chat
    config: Config
    links: Callable[[Model], Links]
    mtp: Callable[[Model], Tensors]
    router: Router | None
    parsers: Parsers
    tiny: Tiny
