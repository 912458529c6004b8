"""From `name=value` words to a checked `Recipe`."""

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, cast, get_args

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from recipes.config import Recipe
from recipes.errors import ConfigError
from recipes.layout import check_layout
from recipes.values import check_values

REPO = Path(__file__).resolve().parents[1]
CONF = REPO / "hydra_conf"
GROUPS = sorted(p.name for p in CONF.iterdir() if p.is_dir())


def in_ray_job() -> bool:
    """Whether this process is the entry point of a Ray job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def local_root() -> str:
    """Default of `cluster.root` on one machine: the checkout, or `~/limi` in a Ray job, whose checkout is a copy
    that Ray removes."""
    return str(Path.home() / "limi") if in_ray_job() else str(REPO)


OmegaConf.register_new_resolver("repo", lambda: str(REPO), replace=True)
OmegaConf.register_new_resolver("local_root", local_root, replace=True)
ConfigStore.instance().store(name="schema", node=Recipe)


def leaves(node: Any = Recipe, prefix: str = "") -> dict[str, Any]:
    """Every name that can be overridden, with its type: `{"optim.lr": float, ...}`."""
    found: dict[str, Any] = {}
    for f in fields(node):
        if is_dataclass(f.type):
            found |= leaves(f.type, f"{prefix}{f.name}.")
        else:
            found[prefix + f.name] = f.type
    return found


def _is_text(kind: Any) -> bool:
    members = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return str in members and set(members) <= {str, NoneType}


def _checked(word: str, names: dict[str, Any]) -> str:
    """One command-line word in Hydra's grammar: known names only, and text that needs quotes quoted."""
    name, equals, value = word.partition("=")
    if not equals:
        raise ConfigError(f"'{word}' is not name=value", "write for example optim.lr=2e-5, or see `make help`")
    plain = name.lstrip("+~")
    inside_dict = any(plain.startswith(f"{n}.") for n, kind in names.items() if getattr(kind, "__origin__", 0) is dict)
    if name != plain or not (plain in names or plain in GROUPS or inside_dict):
        raise ConfigError(f"unknown option '{name}'", _instead(plain, value, [*names, *GROUPS]))
    if plain in GROUPS:
        _check_choice(plain, value)
    if inside_dict:
        return f"++{plain}={_quoted(value)}"
    return f"{plain}={_quoted(value)}" if _is_text(names.get(plain)) else f"{plain}={value}"


def _instead(name: str, value: str, options: list[str]) -> str:
    """What to write in the place of a name that is not there: the nearest one, in either case, or by its last part alone."""
    whole = {o.casefold(): o for o in options}
    known = {o.rpartition(".")[2].casefold(): o for o in reversed(options)} | whole
    for among, cutoff in ((known, 0.7), (whole, 0.0)):
        if near := difflib.get_close_matches(name.casefold(), among, n=1, cutoff=cutoff):
            break
        if name.isupper():
            return f"a variable of the environment stands before the command: {name}={value} make ..."
    return f"the nearest is '{among[near[0]]}': write {among[near[0]]}={value}"


def _quoted(value: str) -> str:
    """Text as Hydra's grammar wants it, where , ( { [ ' = # and 1e3 mean something; quoted, null and ${...} stay."""
    if re.fullmatch(r"""'.*'|".*"|null|.*\$\{.*""", value, re.S):
        return value
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", value) + "'"


def _check_choice(group: str, value: str) -> None:
    choices = sorted(p.stem for p in (CONF / group).glob("*.yaml"))
    if value not in choices:
        near = difflib.get_close_matches(value, choices, n=1, cutoff=0.0)
        nearest = f"; the nearest is {group}={near[0]}" if near else ""
        raise ConfigError(f"unknown {group} '{value}'{nearest} (known: {', '.join(choices) or 'none'})")


def compose_recipe(words: Sequence[str]) -> Recipe:
    """The recipe of `hydra_conf/limi.yaml` with these overrides, every name, type and layout rule checked.

    Raises `ConfigError` with the nearest right name for a wrong one.
    """
    names = leaves()
    overrides = [_checked(word, names) for word in words]
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            raw = compose("limi", overrides)
        recipe = cast(Recipe, OmegaConf.to_object(raw))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explained(error)) from error
    recipe.words = list(words)
    check_values(recipe)
    if recipe.layout.search:
        recipe.layout.fixed = [w.partition("=")[0].removeprefix("layout.") for w in words if w.startswith("layout.")]
    else:
        check_layout(recipe)
    return recipe


def _explained(error: BaseException) -> str:
    """The innermost cause, on one line, without Hydra's advice to force a name in with '+'."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error)
    key = re.search(r"full_key: (\S+)", text)
    if isinstance(error, MissingMandatoryValue) and key:
        return f"{key[1]} is not set; write {key[1]}=VALUE"
    if missing := re.search(r"Could not find 'layout/released-(.*)'", text):
        raise ConfigError(
            f"experiment=released is of LIMI's own models, and not of {missing[1]}", "write model=qwen3-4b"
        )
    first = text.splitlines()[0].split(". To append")[0]
    return f"{key[1]}: {first}" if key else " ".join(text.split())


def from_yaml(path: Path) -> Recipe:
    """The recipe that `to_yaml` wrote. Raises `ConfigError` where another version wrote it, or it was edited."""
    try:
        return cast(Recipe, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), OmegaConf.load(path))))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(
            f"'{path}' is no recipe of this version: {str(error).splitlines()[0]}", "mend that line there"
        ) from error


def run_folder(r: Recipe) -> Path:
    """`runs/NAME/` under `cluster.root`: everything one run leaves behind."""
    return Path(r.cluster.root) / "runs" / r.run


def to_yaml(r: Recipe) -> str:
    """The resolved recipe as YAML, for `config.yaml`, `dry_run=true` and the report."""
    return OmegaConf.to_yaml(OmegaConf.structured(r))
