"""Render the checkpoint's own chat template as `apply_chat_template` does, but fast enough for every prompt of a trajectory.

The proof renders one prompt per assistant turn, so the template renders each message once for every turn after it. Two
results that transformers' environment recomputes on each call are cached: the JSON of a tool or of arguments, and
whether the sandbox allows an attribute. The rendered text is identical; a test checks this.
"""

import contextlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, Template, TemplateError, TemplateSyntaxError
from jinja2.meta import find_undeclared_variables
from jinja2.nodes import Name
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from data_prep.text.template_options import OWN, option_values
from data_prep.trajectory import Code, Rejected
from recipes.checkpoint.checkpoint_config import AGAIN
from recipes.errors import ConfigError, DataError

_DICT_ATTRIBUTES = frozenset(dir(dict))
# The sandbox wraps the formatting methods of a string on every access.
_WRAPPED = frozenset({"format", "format_map"})


class ChatTemplate:
    """Render messages and tools with a tokenizer's template. options: `model.template_options`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, str] | None = None) -> None:
        self._tokenizer = tokenizer
        self._options = option_values(options or {})
        self._check_options()
        self._compiled: dict[str, Template] = {}
        self._json: dict[tuple[int, str], tuple[Any, str]] = {}

    @property
    def name(self) -> Path:
        """Return the file that contains the template."""
        own = Path(self._tokenizer.name_or_path, "chat_template.jinja")
        return own if own.is_file() else own.with_name("tokenizer_config.json")

    def forget(self) -> None:
        """Drop the texts cached for the last trajectory."""
        self._json.clear()

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], *, prompt: bool = False) -> str:
        """Return the text of the messages; with `prompt`, return the text that inference sends for the next assistant turn.

        `messages` and `tools` must not change before `forget()`. Raise `Rejected` if the template raises.
        """
        source = self._tokenizer.get_chat_template(None, tools or None)
        if source not in self._compiled:
            self._compiled[source] = self._compile(source)
        try:
            return self._compiled[source].render(
                messages=messages,
                # Templates test `if tools`. Pass None for an empty list, as a server does.
                tools=tools or None,
                documents=None,
                add_generation_prompt=prompt,
                **{**self._tokenizer.special_tokens_map, **self._options},
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

    def _check_options(self) -> None:
        """Raise `ConfigError` for an option that the template does not read."""
        if not self._options:
            return
        source = self._tokenizer.get_chat_template(None, None)
        tree = _compile_jinja_template(source).environment.parse(source)
        assigned = {name.name for name in tree.find_all(Name) if name.ctx == "store"}
        read = find_undeclared_variables(tree) - assigned - {*OWN}
        for name in self._options:
            if name in OWN or name not in read:
                known = ", ".join(
                    sorted(read - {*self._tokenizer.special_tokens_map, "raise_exception", "strftime_now"})
                )
                raise ConfigError(
                    f"model.template_options.{name}: the chat template '{self.name}' does not read it",
                    f"it reads {known or 'no option'}",
                )

    def parts_join(self) -> str:
        """Return what stands between the text parts of a message as a server renders it.

        SGLang hands a list of parts to a template that renders lists, and otherwise joins them with a space
        (SGLang 0.5.23, `jinja_template_utils.py`).
        """
        parts = [{"type": "text", "text": text} for text in ("first-part", "second-part")]
        try:
            text = self.render([{"role": "user", "content": parts}], [])
        except Rejected:
            return " "
        finally:
            self.forget()
        found = re.search(r"first-part(.*?)second-part", text, re.DOTALL)
        return found[1] if found and "text" not in found[1] else " "

    def _compile(self, source: str) -> Template:
        try:
            environment = _compile_jinja_template(source).environment.overlay()
        except TemplateSyntaxError as error:
            raise DataError(f"'{self.name}', line {error.lineno}: {error.message}", AGAIN) from error
        environment.getattr = _caching_getattr(environment)
        environment.filters = {**environment.filters, "tojson": self._caching_tojson(environment.filters["tojson"])}
        return environment.from_string(source)

    def _caching_tojson(self, tojson: Callable[..., str]) -> Callable[..., str]:
        def cached(value: Any, *args: Any, **options: Any) -> str:
            if args or not isinstance(value, dict | list):
                return tojson(value, *args, **options)
            key = (id(value), repr(options))
            if key not in self._json:
                # Cache the value with its text: the id of a freed object could be reused.
                self._json[key] = (value, tojson(value, **options))
            return self._json[key][1]

        return cached


def _caching_getattr(environment: Environment) -> Callable[[Any, str], Any]:
    checked = environment.getattr
    safe: set[tuple[type, str]] = set()

    def cached(value: Any, name: str) -> Any:
        value_type = type(value)
        if (value_type, name) in safe:
            # Namespaces share one type but have different names.
            with contextlib.suppress(AttributeError):
                return getattr(value, name)
        if value_type is dict and name not in _DICT_ATTRIBUTES:
            # Jinja gets the same result after its attribute lookup.
            return value[name] if name in value else environment.undefined(obj=value, name=name)
        attribute = checked(value, name)
        # The sandbox decides by type and name alone. The names of a namespace are its values.
        if name not in _WRAPPED and hasattr(value, name) and attribute == getattr(value, name):
            safe.add((value_type, name))
        return attribute

    return cached
