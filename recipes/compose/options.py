"""The options of the recipe: their names, types and allowed values; the groups and their choices."""

import re
from dataclasses import fields, is_dataclass
from pathlib import PurePath
from typing import Any, get_origin

from recipes.compose.kinds import advice, hydra_value, quoted, shown, typed
from recipes.compose.names.nearest import nearest
from recipes.config import Recipe
from recipes.errors import ConfigError
from recipes.paths import CONF

GROUPS = sorted(p.name for p in CONF.iterdir() if p.is_dir())


def leaves(node: Any = Recipe, prefix: str = "") -> dict[str, Any]:
    """Return every name that can be overridden, with its type: `{"optim.lr": float, ...}`.

    The program fills in lists, so they are left out.
    """
    found: dict[str, Any] = {}
    for f in fields(node):
        if is_dataclass(f.type):
            found |= leaves(f.type, f"{prefix}{f.name}.")
        elif get_origin(f.type) is not list:
            found[prefix + f.name] = f.type
    return found


NAMES = leaves()
DICTS = [name for name, kind in NAMES.items() if get_origin(kind) is dict]


def is_option(name: str) -> bool:
    """Return whether there is an option or a group with exactly this name."""
    return name in NAMES or name in GROUPS or _dict_of(name) is not None


def override(name: str, value: str) -> str:
    """Return the override of an option or a group in Hydra's grammar. Raise `ConfigError` if the value is not allowed."""
    if name in GROUPS:
        _check_choice(name, value)
        return f"{name}={value}"
    if (of := _dict_of(name)) is not None:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", key := name.removeprefix(f"{of}.")):
            raise ConfigError(f"'{shown(key)}' is no name in {of}", f"write {of}.NAME={shown(value)}")
        return f"++{name}={quoted(value)}"
    if name in DICTS:
        raise ConfigError(f"{name} holds a value for each name", f"write {name}.NAME=VALUE")
    return f"{name}={hydra_value(name, NAMES[name], value)}"


def choices(group: str) -> list[str]:
    """Return the choices of a group: the names of its files. `group=NAME` selects one."""
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


def _dict_of(name: str) -> str | None:
    """Return the dictionary option that `name` is an entry of, or None."""
    return next((d for d in DICTS if name.startswith(f"{d}.")), None)


def _check_choice(group: str, value: str) -> None:
    """Raise `ConfigError` if the group has no such choice."""
    known = choices(group)
    if value not in known:
        problem = f"unknown {group} '{shown(value)}'" if value else f"{group}='' is empty"
        raise ConfigError(f"{problem} (known: {', '.join(known)})", _choice_instead(group, typed(value).strip(" \"'")))


def _choice_instead(group: str, value: str) -> str:
    if group == "model" and "/" in value:
        return _model_of(value)
    if near := nearest(value, choices(group)):
        return advice(f"{group}={near}")
    if group == "data" and ("/" in value or PurePath(value).suffix):
        return f"{advice('data=NAME', f'data.path={value}')}, NAME being the form it has"
    return f"write {group}=NAME, one of them"


def _model_of(checkpoint: str) -> str:
    """Return what to write for a model that was named by its folder or by its id on the Hugging Face hub."""
    models = choices("model")
    for model in models:
        own = re.search(r"^checkpoint: *(\S+)", (CONF / "model" / f"{model}.yaml").read_text(encoding="utf-8"), re.M)
        if own and own[1].casefold() == checkpoint.casefold():
            return advice(f"model={model}")
    named = _letters(PurePath(checkpoint).name)
    inside = [model for model in models if _letters(model) in named]
    if inside:
        return advice(f"model={max(inside, key=len)}", f"model.checkpoint={checkpoint}")
    return f"{advice('model=NAME', f'model.checkpoint={checkpoint}')}, NAME being one with its dimensions"


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())
