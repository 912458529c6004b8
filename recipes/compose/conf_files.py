"""The check of the YAML files of `hydra_conf/` after edits by the user. An error names the file and the line."""

from pathlib import Path
from typing import Any

from yaml import MarkedYAMLError, YAMLError
from yaml.reader import ReaderError

from recipes.errors import ConfigError


def check_conf(folder: Path) -> None:
    """Raise `ConfigError` for the first file of the folder that is not a YAML mapping."""
    for path in sorted(folder.rglob("*.yaml")):
        check_yaml(path)


def check_yaml(path: Path) -> None:
    """Raise `ConfigError` if a file is not a YAML mapping."""
    fix = "fix it there"
    from omegaconf._utils import get_yaml_loader

    raw = path.read_bytes()
    try:
        loader: Any = get_yaml_loader()(raw.decode())  # this loader refuses duplicate keys
        found = loader.get_single_data()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"'{path}', line {line} is not UTF-8, and YAML belongs there", fix) from error
    except ReaderError as error:
        line = raw.decode().count("\n", 0, error.position) + 1
        raise ConfigError(f"'{path}', line {line} holds a control character", fix) from error
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"'{path}'{where}: {error.problem or error.context}", fix) from error
    except YAMLError as error:
        raise ConfigError(f"'{path}' is no YAML: {error}", fix) from error
    if not isinstance(found, dict | None):
        raise ConfigError(f"'{path}' holds no `name: value` lines, which belong there", fix)
