"""Values of overrides: the text after `=`, read as the type of the option. A `kind` is the annotated type of a field."""

import math
import re
import shlex
import unicodedata
from enum import Enum
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from recipes.compose.names.nearest import nearest
from recipes.errors import ConfigError

_FLAGS = dict.fromkeys(("true", "yes", "on", "y", "1"), "true") | dict.fromkeys(
    ("false", "no", "off", "n", "0"), "false"
)
_WANTED = {bool: "true or false", int: "a whole number", float: "a number"}
_TIMES = {"k": 1, "m": 2, "g": 3}
_TYPED = str.maketrans(
    dict.fromkeys("‐‑‒–—―−", "-") | dict.fromkeys("“”„‟″", '"') | dict.fromkeys("‘’‚‛′", "'")
    | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", "")
)  # fmt: skip


def typed(text: str) -> str:
    """Return the text with plain dashes, quotes and spaces in place of typographic ones."""
    return unicodedata.normalize("NFKC", text).translate(_TYPED)


def shown(text: str) -> str:
    """Return the text for a message, with control and invisible characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def advice(*words: str) -> str:
    """Return the advice to write these words, quoted for a shell."""
    return "write " + shown(shlex.join(words))


def as_flag(text: str) -> str | None:
    """Return `true` or `false` for any spelling of a flag, or None for another text."""
    return _FLAGS.get(text.strip().casefold())


def holds_text(kind: Any) -> bool:
    """Return whether an option of this kind accepts any text, as the entries of a dictionary do."""
    return kind is None or get_origin(kind) is dict or str in _members(kind)


def example(name: str, kind: Any) -> str:
    """Return what to write for an option of this kind. kind: None for a group."""
    base: Any = str if kind is None or get_origin(kind) is dict else _base(kind)
    if base is bool:
        return f"{name}=true or {name}=false"
    if issubclass(base, Enum):
        return f"{name}=CHOICE, one of {', '.join(member.name for member in base)}"
    if base is str:
        return f"{name}={'TEXT' if kind else 'NAME'}"
    return f"{name}=N, a whole number" if base is int else f"{name}=X, a number"


def hydra_value(name: str, kind: Any, text: str) -> str:
    """Return `text` in Hydra's grammar. Raise `ConfigError` if it is not a value of `kind`; the fix shows a valid one."""
    optional, base = NoneType in _members(kind), _base(kind)
    if "${" in text:
        return quoted(text)
    if not text:
        given = f"{name}=null" if optional else example(name, base)
        raise ConfigError(f"{name}='' is empty", f"leave {name} out, or write {given}")
    if optional and text == "null":
        return text
    if optional and text.casefold() in ("null", "none"):
        raise ConfigError(f"{name}={text}: an option without a value is null", advice(f"{name}=null"))
    if base is str:
        if text == "null":
            raise ConfigError(f"{name}=null: this option has a value", f"leave {name} out, or write {name}=TEXT")
        return quoted(text)
    bare = _unquoted(text)
    if issubclass(base, Enum):
        return _choice(name, [member.name for member in base], bare)
    if (value := _read(base, bare)) is None:
        raise _no_value(name, base, bare)
    return value


def listed(kind: Any, text: str) -> list[str]:
    """Return the values if `text` lists several for an option that holds one value.

    Return an empty list if it does not. Options that hold text may contain commas, so they never list values.
    """
    base = _base(kind)
    parts = [part.strip() for part in re.sub(r"^(choice)?[\[(](.*)[\])]$", r"\2", text).split(",")]
    if holds_text(kind) or len(parts) < 2 or not all(parts):
        return []
    return parts if issubclass(base, Enum) or all(_read(base, part) is not None for part in parts) else []


def one_number(kind: Any, text: str) -> str | None:
    """Return the number that a text with commas may stand for, or None: `131,072` is 131072 and `0,1` is 0.1."""
    if int in _members(kind) and re.fullmatch(r"\d{1,3}(,\d{3})+", text):
        return text.replace(",", "")
    return text.replace(",", ".") if float in _members(kind) and re.fullmatch(r"0,\d+", text) else None


def quoted(text: str) -> str:
    """Return the text quoted for Hydra's grammar, in which , ( { [ ' = # and 1e3 have a meaning. Quoted text is unchanged."""
    if re.fullmatch(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", text, re.S):
        return text
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text) + "'"


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if isinstance(kind, UnionType) else (kind,)


def _base(kind: Any) -> Any:
    """Return the type of an option's value other than None."""
    return next(member for member in _members(kind) if member is not NoneType)


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _read(base: type, text: str) -> str | None:
    """Return the value in Hydra's spelling, or None if the text is not a value of this type."""
    if base is bool:
        return _FLAGS.get(text.casefold())
    if not text.isascii() or len(text) > 32:
        return None
    if base is int:
        return str(int(text)) if re.fullmatch(r"[+-]?\d+(_\d+)*", text) else None
    try:
        return repr(float(text)) if text == text.strip() else None
    except ValueError:
        return None


def _choice(name: str, choices: list[str], text: str) -> str:
    """Return the text if it is one of the choices. Raise `ConfigError` if not."""
    if text in choices:
        return text
    near = nearest(typed(text), choices)
    known = ", ".join(choices)
    raise ConfigError(
        f"{name}={shown(text)} is none of {known}",
        advice(f"{name}={near}") if near else f"write {name}=CHOICE, one of them",
    )


def _no_value(name: str, base: type, text: str) -> ConfigError:
    """Return the error for a text that is not a value of this type, with what was probably meant."""
    wrong = [c for c in text if typed(c) != c]
    problem = f"{name}={shown(text)} is not {_WANTED[base]}"
    if wrong:
        character = unicodedata.name(wrong[0], "character").lower()
        problem += f": its {character} (U+{ord(wrong[0]):04X}) is not a keyboard's"
    meant = list(dict.fromkeys(value for value in _meant(base, text) if _read(base, value) is not None))
    if meant:
        return ConfigError(problem, "write " + " or ".join(f"{name}={value}" for value in meant[:2]))
    return ConfigError(problem, f"write {example(name, base)}")


def _meant(base: type, text: str) -> list[str]:
    """Return what was probably meant by a text that is no value of its type, the likeliest first; some may be invalid too."""
    bare = re.split(r"\s*#", typed(text))[0].strip(" \t\"'`[](){}<>,;")
    if base is bool:
        near = nearest(bare, _FLAGS)
        return [_FLAGS[near]] if near else []
    found = [bare]
    if re.fullmatch(r"\d{1,3}([\s,]\d{3})+", bare):
        found.append(re.sub(r"[\s,]", "", bare))
    if unit := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg])(?:i?b|tokens)?", bare, re.I):
        found += [f"{float(unit[1]) * step ** _TIMES[unit[2].lower()]:.0f}" for step in (1000, 1024)]
    if share := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", bare):
        found.append(f"{float(share[1]) / 100:g}")
    if base is int and (number := _read(float, bare)) is not None and 1 <= float(number) < 1e15:
        found += [str(math.floor(float(number))), str(math.ceil(float(number)))]
    return found
