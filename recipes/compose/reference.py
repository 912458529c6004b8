"""Writes `hydra_conf/REFERENCE.md`, every option with its type, default and meaning: `python -m recipes.compose.reference`.

Meanings are the comments of `recipes/config.py`, defaults its values and those of the files of `hydra_conf/`.
"""

import ast
import re
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from types import UnionType
from typing import Any, get_args, get_origin

import yaml

from recipes import config
from recipes.paths import CONF, REPO

PATH = CONF / "REFERENCE.md"
_HEAD = """# Every option

Made by `make reference` from the comments of [`recipes/config.py`](../recipes/config.py) and the files of this folder; do not edit.
`make plan dry_run=true` shows all values of a recipe, and what set each. A default in `(…)` is of a group's file; `required` has none.
Lengths are in tokens, times in seconds, sizes in bytes, unless a line says otherwise.
"""


def reference() -> str:
    """Return the text of REFERENCE.md."""
    meanings = _meanings((REPO / "recipes" / "config.py").read_text(encoding="utf-8"))
    own = [f for f in fields(config.Recipe) if not is_dataclass(f.type) and get_origin(f.type) is not list]
    parts = [_HEAD, "## Of every command\n", _table([_row("", config.Recipe, f, meanings) for f in own])]
    for group in (f for f in fields(config.Recipe) if is_dataclass(f.type)):
        rows = _rows(f"{group.name}.", group.type, meanings)
        parts += [f"\n## `{group.name}`\n", _table(rows)]
    enums = [e for e in vars(config).values() if isinstance(e, type) and issubclass(e, Enum) and len(e)]
    parts += ["\n## Choices\n"]
    for one in sorted(enums, key=lambda e: e.__name__):
        text = " ".join((one.__doc__ or "").split())
        parts.append(f"- **{one.__name__}**: {', '.join(f'`{m.value}`' for m in one)}. {text}".rstrip())
    return "\n".join(parts) + "\n"


def _rows(prefix: str, of: Any, meanings: dict[str, str]) -> list[Any]:
    """Return the rows of a group's options, those of a group inside it included."""
    found = []
    for f in fields(of):
        if is_dataclass(f.type):
            found += _rows(f"{prefix}{f.name}.", f.type, meanings)
        elif get_origin(f.type) is not list:
            found.append(_row(prefix, of, f, meanings))
    return found


def _meanings(source: str) -> dict[str, str]:
    """{class.field: the comment behind it, or the lines of comment right above it}."""
    lines, found = source.splitlines(), {}
    for of in (n for n in ast.parse(source).body if isinstance(n, ast.ClassDef)):
        for field in (n for n in of.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)):
            assert isinstance(field.target, ast.Name)
            behind = re.search(r"  # (.*)", lines[(field.end_lineno or field.lineno) - 1])
            above: list[str] = []
            at = field.lineno - 2
            while lines[at].strip().startswith("# "):
                above.insert(0, lines[at].strip()[2:])
                at -= 1
            found[f"{of.name}.{field.target.id}"] = behind[1] if behind else " ".join(above)
    return found


def _row(prefix: str, of: Any, field: Any, meanings: dict[str, str]) -> tuple[str, str, str, str]:
    name = prefix + field.name
    return f"`{name}`", _kind(field.type), _default(name, field), meanings[f"{of.__name__}.{field.name}"]


def _kind(kind: Any) -> str:
    if isinstance(kind, UnionType):
        return " or ".join("null" if k is type(None) else _kind(k) for k in get_args(kind))
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}.get(
        getattr(kind, "__name__", ""), str(getattr(kind, "__name__", "name to text")).replace("dict", "name to text")
    )


def _default(name: str, field: Any) -> str:
    """What the schema says, and what each file of the option's group does."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    said = "" if default in (MISSING, "???") else _shown(default)
    group, _, option = name.rpartition(".")
    files = [CONF / "limi.yaml"] if not group else [] if group == "model" else sorted((CONF / group).glob("*.yaml"))
    texts = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) or {} for path in files}
    values: dict[str, list[str]] = {}
    for stem, text in texts.items():
        if option in text:
            values.setdefault(_shown(text[option]), []).append(stem)
    own = [f"{value} ({', '.join(stems)})" for value, stems in values.items() if value != said]
    return ", ".join([*([said] if said else []), *own]) or "required"


def _shown(value: Any) -> str:
    if isinstance(value, Enum):
        value = value.value
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
    return f"`{text:g}`" if isinstance(text, float) else f"`{text}`"


def _table(rows: list[tuple[str, str, str, str]]) -> str:
    lines = ["| option | type | default | meaning |", "|---|---|---|---|"]
    return "\n".join([*lines, *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)])


if __name__ == "__main__":
    PATH.write_text(reference(), encoding="utf-8")
