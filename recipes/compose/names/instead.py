"""Advice for an unknown option: the option that was probably meant, or the equivalent of another framework's option."""

import re

from recipes.compose.kinds import advice, as_flag, example, shown, typed
from recipes.compose.names.foreign_names import FOREIGN, Foreign
from recipes.compose.names.nearest import folded, misspelt, nearest, same_key
from recipes.compose.options import DICTS, GROUPS, NAMES, override
from recipes.compose.values import SECRET
from recipes.errors import ConfigError

_OPTIONS = [*NAMES, *GROUPS]
_FOREIGN = {name: entry for entry in FOREIGN for name in entry.names.split()}
_QUOTES = "\"'`"


def instead(name: str, value: str) -> str:
    """Return the advice for an unknown option. value: the value it was given; empty if not known."""
    plain = typed(name).strip().lstrip("+~-" + _QUOTES).rstrip(_QUOTES + " ")
    if typed(name).lstrip("+~- ").startswith(tuple(_QUOTES)):
        value = typed(value).rstrip(_QUOTES)
    if plain in _OPTIONS:
        return _to_write((plain, value))
    entry = foreign(plain)
    meant = [option for option in _OPTIONS if folded(option) == folded(plain)] or ([] if entry else _meant(plain))
    if meant:
        return _nearest_is(meant, value)
    if entry := entry or _FOREIGN.get(nearest(plain.rpartition(".")[2], _FOREIGN) or ""):
        return _as_here(entry, value)
    if re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
        given = "..." if SECRET.search(name) else shown(value)
        return f"a variable of the environment stands before the command: {name}={given} make ..."
    return _listed(plain)


def is_like_option(word: str) -> bool:
    """Return whether a word without `=` is probably an option and not a stage: `--lr`, `optim.lr`, `optim.lr:1e-5`."""
    plain = re.split("[:=]", typed(word).lstrip("+~-"))[0]
    dashed = typed(word).startswith("-") and plain[:1].isalpha()
    dotted = "." in plain and plain.partition(".")[0] in GROUPS
    return plain not in ("h", "help") and bool(dashed or dotted or plain in _OPTIONS or foreign(plain))


def as_here(name: str, value: str) -> str | None:
    """Return the advice for another framework's option, or None if it is not known."""
    entry = foreign(name)
    return _as_here(entry, value) if entry else None


def foreign(name: str) -> Foreign | None:
    """Return the entry of another framework's option, or None. The option may have any group in front of it."""
    parts = folded(name).split(".")
    return next((e for i in range(len(parts)) if (e := _FOREIGN.get(".".join(parts[i:])))), None)


def _meant(name: str) -> list[str]:
    """Return the options that `name` misspells, or that have the same last part in another group."""
    group, _, last = name.rpartition(".")
    if (of := nearest(group, DICTS)) is not None:
        return [f"{of}.{last}"]
    meant = same_key(name, _OPTIONS) or misspelt(name, _OPTIONS)
    return meant or ([] if folded(group) in GROUPS else misspelt(last, _OPTIONS))


def _to_write(*wanted: tuple[str, str]) -> str:
    """Return the advice to write these options with their values.

    If the value of an option is unknown or wrong, the advice says what it may be.
    """
    for option, value in wanted:
        if not value:
            kind = NAMES.get(option)
            return f"write {option}=true" if kind is bool else shown(f"write {example(option, kind)}")
        try:
            override(option, value)
        except ConfigError as error:
            return error.fix
    return advice(*("=".join(pair) for pair in wanted))


def _nearest_is(options: list[str], value: str) -> str:
    """Return the advice that names the nearest option, or several if they are equally near."""
    if len(options) == 1:
        return f"the nearest is '{shown(options[0])}': {_to_write((options[0], value))}"
    return "write one of " + ", ".join(f"{option}={shown(value) or 'VALUE'}" for option in options)


def _as_here(entry: Foreign, value: str) -> str:
    """Return the advice of an entry for this value."""
    templates = {"": entry.write} if isinstance(entry.write, str) else entry.write
    pairs = [word.partition("=") for word in _by_value(templates, value or "true").split()]
    wanted = [(option, given.replace("{}", value)) for option, _, given in pairs]
    if not wanted:
        return entry.note or f"write {' or '.join(dict.fromkeys(templates.values()))}"
    note = f" ({entry.note})" if entry.note else ""
    options = " and ".join(f"'{option}'" for option, _ in wanted)
    return f"here it is {options}{note}: {_to_write(*wanted)}"


def _by_value(table: dict[str, str], value: str) -> str:
    """Return the overrides that the table has for a value; empty if it has none."""
    keys = (value.casefold(), as_flag(value), "<1" if _is_share(value) else None, "")
    return next((table[key] for key in keys if key in table), "")


def _is_share(value: str) -> bool:
    try:
        return 0 < float(value) < 1
    except ValueError:
        return False


def _listed(name: str) -> str:
    """Return a list of the options: those of the group if `name` has a known group, else the top-level ones and the groups."""
    group = folded(name).partition(".")[0]
    keys = [option.removeprefix(f"{group}.") for option in NAMES if option.startswith(f"{group}.")]
    if "." in name and keys:
        return f"the options of {group}. are {', '.join(keys)}"
    alone = [option for option in NAMES if "." not in option]
    return f"options are {', '.join(alone)}, and those of the groups {', '.join(GROUPS)}: model=qwen3-4b, optim.lr=1e-5"
