"""The words of a command line, `name=value`, as overrides for Hydra. A wrong word is refused with the correct one."""

import re
import shlex
import unicodedata
from collections.abc import Sequence

from recipes.compose.kinds import advice, holds_text, listed, one_number, shown, typed
from recipes.compose.names.instead import foreign, instead
from recipes.compose.names.nearest import same_key
from recipes.compose.options import GROUPS, NAMES, is_option, override
from recipes.compose.values import SECRET
from recipes.errors import ConfigError


def checked(words: Sequence[str], stage: str) -> list[str]:
    """Return the words in Hydra's grammar. stage: target of the command, for the advice on several runs.

    Raise `ConfigError` if a name is unknown, a value is not allowed, or a word is not exactly one override.
    """
    made = []
    for place, word in enumerate(words):
        name, value = _parted(word)
        values = _listed(name, value)
        for one in values:
            override(name, one)
        if values:
            raise _one_by_one(words, place, values, stage)
        made.append(override(name, value))
    return made


def without_value(word: str, following: str = "") -> ConfigError:
    """Return the error for a word without `=`. following: the next word, if it may be the value."""
    name, *rest = re.split("[:=]", typed(word), maxsplit=1)
    said = f"{word} {following}" if following and not rest and not SECRET.search(name) else word
    return ConfigError(f"'{shown(said)}' is not name=value", instead(name, rest[0].strip() if rest else following))


def _parted(word: str) -> tuple[str, str]:
    """(name, value) of a word whose name is an option's."""
    several = _several(word)
    if several:
        raise ConfigError(
            f"'{shown(word)}' is {len(several)} words in one",
            f"{advice(*several)}, each a word of its own, without quotes around them all",
        )
    name, equals, value = word.partition("=")
    # Inside text, such as a folder's name, control characters may be intended. At its ends they come from files of other systems.
    textual = is_option(name) and holds_text(NAMES.get(name)) and name not in GROUPS
    if any(map(_is_control, name + (value[:1] + value[-1:] if textual else value))):
        raise ConfigError(
            f"'{shown(word)}' has a line break or another control character in it",
            instead("".join(c for c in name if not _is_control(c)), "".join(c for c in value if not _is_control(c))),
        )
    if not equals:
        raise without_value(word)
    if name.strip() != name and is_option(name.strip()):
        raise ConfigError(f"'{shown(word)}' has a space beside its '='", instead(name, value.strip()))
    if not is_option(name):
        raise ConfigError(f"unknown option '{shown(name)}'", instead(name, value.strip()))
    return name, value


def _several(word: str) -> list[str]:
    """Return the overrides in a word that contains several, else an empty list.

    Text may contain spaces and `=`, so after a text option only the name of an option starts another override.
    """
    parts = re.split(r"\s+(?=[^\s=]+=)", word.strip())
    first, *later = (part.partition("=")[0] for part in parts)
    if not later or "=" not in parts[0]:
        return []
    if first in GROUPS or (first in NAMES and not holds_text(NAMES[first])):
        return parts
    begins = is_option if is_option(first) else _is_known
    return parts if any(begins(name) for name in later) else []


def _is_known(name: str) -> bool:
    """Return whether `name` is an option's name, an option's last part, or another framework's option."""
    return bool(is_option(name) or foreign(name) or same_key(name, NAMES))


def _is_control(c: str) -> bool:
    return unicodedata.category(c) == "Cc"


def _listed(name: str, value: str) -> list[str]:
    """Return the values if `value` lists several, else an empty list."""
    if name in GROUPS:
        parts = value.split(",")
        return parts if len(parts) > 1 and all(parts) else []
    return listed(NAMES[name], value) if name in NAMES else []


def _one_by_one(words: Sequence[str], place: int, values: list[str], stage: str) -> ConfigError:
    """Return the error for an override with several values where one belongs. Its fix is one command per value, each with its own run
    name."""
    name, _, given = words[place].partition("=")
    others = [word for i, word in enumerate(words) if i != place and not word.startswith("run=")]
    run = next((f"{word.partition('=')[2]}-" for word in words if word.startswith("run=")), "")
    commands = []
    for value in values:
        own = re.sub(r"[^\w.-]+", "-", f"{run}{name.rpartition('.')[2]}-{value}")
        commands.append(shlex.join(["make", stage, *others, f"{name}={value}", f"run={own}"]))
    one = one_number(NAMES.get(name), given)
    alone = f"{advice(f'{name}={one}')} for one number, or " if one else ""
    if stage == "train":
        swept = advice(f"sweep={name}={','.join(values)}")
        return ConfigError(
            f"{shown(words[place])} lists {len(values)} values, and a run takes one",
            f"{alone}{swept}, which runs one after the other, each under a name of its own",
        )
    return ConfigError(
        f"{shown(words[place])} lists {len(values)} values, and a run takes one",
        f"{alone}run one after the other: {shown(' && '.join(commands))}",
    )
