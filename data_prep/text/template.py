"""The checkpoint's own chat template, as `apply_chat_template` runs it, fast enough to render every prompt of a trajectory.

The proof renders one prompt for each assistant turn, so a template sees each message as often as there are turns after
it. Two things that transformers' environment works out anew each time are remembered: the JSON of a tool or of arguments,
and whether the sandbox lets a template have an attribute. What is rendered is the same text, which a test holds it to.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, Template, TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from data_prep.trajectory import Code, Rejected
from recipes.checkpoint.checkpoint_config import AGAIN
from recipes.errors import DataError

_DICT_ATTRIBUTES = frozenset(dir(dict))
# Reading a method of a text that formats is wrapped by the sandbox each time.
_WRAPPED = frozenset({"format", "format_map"})


class ChatTemplate:
    """Renders messages and tools with a tokenizer's template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._compiled: dict[str, Template] = {}
        self._json: dict[tuple[int, str], tuple[Any, str]] = {}

    @property
    def name(self) -> Path:
        """The file that the template is in."""
        own = Path(self._tokenizer.name_or_path, "chat_template.jinja")
        return own if own.is_file() else own.with_name("tokenizer_config.json")

    def forget(self) -> None:
        """Lets go of the texts remembered for the last trajectory."""
        self._json.clear()

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], *, prompt: bool = False) -> str:
        """The text of the messages; with `prompt`, as inference sends it for the next assistant turn.

        `messages` and `tools` must not change before `forget()`. Raises `Rejected` where the template does.
        """
        source = self._tokenizer.get_chat_template(None, tools or None)
        if source not in self._compiled:
            self._compiled[source] = self._compile(source)
        try:
            return self._compiled[source].render(
                messages=messages,
                # A template tests `if tools`; no tools are null, as a server sends them.
                tools=tools or None,
                documents=None,
                add_generation_prompt=prompt,
                **self._tokenizer.special_tokens_map,
            )
        except (
            TemplateError,
            TypeError,
            ValueError,
            AttributeError,
            LookupError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise Rejected(Code.template, f"the chat template fails: {error}") from error

    def _compile(self, source: str) -> Template:
        try:
            environment = _compile_jinja_template(source).environment.overlay()
        except TemplateSyntaxError as error:
            raise DataError(f"'{self.name}', line {error.lineno}: {error.message}", AGAIN) from error
        environment.getattr = _remembering_getattr(environment)
        environment.filters = {**environment.filters, "tojson": self._remembering(environment.filters["tojson"])}
        return environment.from_string(source)

    def _remembering(self, tojson: Callable[..., str]) -> Callable[..., str]:
        def remembered(value: Any, *given: Any, **options: Any) -> str:
            if given or not isinstance(value, dict | list):
                return tojson(value, *given, **options)
            key = (id(value), repr(options))
            if key not in self._json:
                # The value is kept with its text: a freed one's id could come back.
                self._json[key] = (value, tojson(value, **options))
            return self._json[key][1]

        return remembered


def _remembering_getattr(environment: Environment) -> Callable[[Any, str], Any]:
    checked = environment.getattr
    safe: set[tuple[type, str]] = set()

    def remembered(value: Any, name: str) -> Any:
        kind = type(value)
        if (kind, name) in safe:
            # Namespaces are of one type and have other names each.
            with contextlib.suppress(AttributeError):
                return getattr(value, name)
        if kind is dict and name not in _DICT_ATTRIBUTES:
            # What Jinja ends up with after it has looked for an attribute.
            return value[name] if name in value else environment.undefined(obj=value, name=name)
        found = checked(value, name)
        # The sandbox decides by type and name alone; a namespace's names are its values.
        if name not in _WRAPPED and hasattr(value, name) and found == getattr(value, name):
            safe.add((kind, name))
        return found

    return remembered
