"""The recipe of a command: `name=value` words to a checked `Recipe`, and recipes to and from YAML."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from recipes.compose.conf_files import check_conf, check_yaml
from recipes.compose.kinds import shown
from recipes.compose.overrides import checked
from recipes.compose.values import check_values
from recipes.config import Recipe
from recipes.errors import ConfigError
from recipes.layout import check_layout
from recipes.paths import CONF, REPO, local_root

OmegaConf.register_new_resolver("repo", lambda: str(REPO), replace=True)
OmegaConf.register_new_resolver("local_root", local_root, replace=True)
ConfigStore.instance().store(name="schema", node=Recipe)


def compose_recipe(overrides: Sequence[str], stage: str = "train") -> Recipe:
    """Return the recipe of `hydra_conf/limi.yaml` with these overrides. Check every name, type and layout rule.

    stage: target of the command. Raise `ConfigError` for a wrong name or value; its fix is what was probably meant.
    """
    legal = checked(overrides, stage)
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            raw = compose("limi", legal)
        recipe = cast(Recipe, OmegaConf.to_object(raw))
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError) as error:
        check_conf(CONF)  # names an edited file and its line
        if isinstance(error, OSError) and not isinstance(error, HydraException):
            raise
        raise _explained(error, overrides) from error
    recipe.overrides = list(overrides)
    check_values(recipe)
    if recipe.layout.search:
        recipe.layout.fixed = [
            w.partition("=")[0].removeprefix("layout.") for w in overrides if w.startswith("layout.")
        ]
    else:
        check_layout(recipe)
    return recipe


def _explained(error: BaseException, overrides: Sequence[str]) -> ConfigError:
    """Return the error for a recipe whose overrides are each correct but do not compose."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error)
    key = re.search(r"full_key: (\S+)", text)
    if isinstance(error, MissingMandatoryValue) and key:
        return ConfigError(f"{key[1]} is not set", f"write {key[1]}=VALUE")
    if missing := re.search(r"Could not find 'layout/released-(.*)'", text):
        return ConfigError(
            f"experiment=released is of LIMI's own models, and not of {missing[1]}", "write model=qwen3-4b"
        )
    taken = [word for word in overrides if "${" in word]
    if taken:
        word = next((w for w in taken if key and w.startswith(f"{key[1]}=")), taken[0])
        return ConfigError(
            f"{shown(word)}: ${{...}} in it names nothing that has a value",
            "write the value itself, ${optim.lr} for that of an option, or ${oc.env:NAME} for a variable of the environment",
        )
    composed = re.match(r"In '(.+)': \w+ raised while composing config:\n", text)  # for a value in a file
    first = text[composed.end() if composed else 0 :].splitlines()[0].split(". To append")[0]
    where = f" (hydra_conf/{composed[1]}.yaml)" if composed else ""
    return ConfigError(f"{key[1]}: {first}{where}" if key else " ".join(text.split()))


def from_yaml(path: Path) -> Recipe:
    """Return the recipe that `to_yaml` wrote. Raise `ConfigError` if another version wrote the file or an edit broke it."""
    check_yaml(path)
    try:
        written = cast(DictConfig, OmegaConf.load(path))
        if "words" in written:  # as versions before 2026-12 call the overrides
            written["overrides"] = written.pop("words")
        return cast(Recipe, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), written)))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(
            f"'{path}' is no recipe of this version: {str(error).splitlines()[0]}", "fix that line there"
        ) from error


def to_yaml(r: Recipe) -> str:
    """Return the resolved recipe as YAML, for `config.yaml`, `dry_run=true` and the report."""
    return OmegaConf.to_yaml(OmegaConf.structured(r))
