"""Where each value of a recipe comes from: the command line, a file of `hydra_conf/`, or the default in `recipes/config.py`."""

from collections.abc import Sequence
from typing import Any

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from recipes.compose.options import GROUPS, NAMES
from recipes.compose.overrides import checked
from recipes.paths import CONF

COMMAND_LINE, SCHEMA = "command line", "recipes/config.py"
_COLUMN = 40  # where the origin begins


def origins(overrides: Sequence[str], stage: str = "train") -> dict[str, str]:
    """Return for every option what set its value last. overrides: those that `compose_recipe` accepts."""
    found = dict.fromkeys(NAMES, SCHEMA)
    for path, package in _files(checked(overrides, stage)):
        values = OmegaConf.to_container(OmegaConf.load(CONF / f"{path}.yaml"))
        prefix = f"{package}." if package else ""
        for name in NAMES:
            if name.startswith(prefix) and _has(values, name.removeprefix(prefix)):
                found[name] = f"hydra_conf/{path}.yaml"
    for word in overrides:
        name = word.partition("=")[0]
        if name not in GROUPS:
            found[name] = COMMAND_LINE
    return found


def _files(legal: list[str]) -> list[tuple[str, str]]:
    """The files of a composition in the order in which Hydra merges them, each with the option that its values belong to."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        merged = loader.compute_defaults_list("limi", legal, RunMode.RUN).defaults
    return [
        (one.config_path, one.package or "")
        for one in merged
        if one.config_path and (CONF / f"{one.config_path}.yaml").is_file()
    ]


def _has(values: Any, name: str) -> bool:
    for part in name.split("."):
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True


def annotated(yaml: str, found: dict[str, str]) -> str:
    """Return the recipe's YAML with the origin of each value behind it."""
    lines: list[str] = []
    path: list[str] = []
    for line in yaml.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        path = [*path[:depth], line.strip().partition(":")[0]]
        origin = found.get(".".join(path))
        lines.append(f"{line:<{_COLUMN}}  # {origin}" if origin else line)
    return "\n".join(lines) + "\n"
