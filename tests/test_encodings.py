"""Text is read and written as UTF-8 by name: what Python takes otherwise is the machine's, ASCII in many containers."""

import ast
import re

from tests.conftest import REPO


def unnamed(tree: ast.AST) -> list[int]:
    """Lines that open a file as text without naming its encoding; `a.open()` without a mode may be something else."""
    found = []
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        method = isinstance(call.func, ast.Attribute)
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        given = [a.value for a in call.args if isinstance(a, ast.Constant)]
        text = (method and name in ("read_text", "write_text")) or (
            name == "open" and any(isinstance(mode, str) and re.fullmatch("[rwax]t?[+]?", mode) for mode in given)
        )
        if text and "utf-8" not in given and not any(k.arg == "encoding" for k in call.keywords):
            found.append(call.lineno)
    return found


def test_every_file_of_text_is_opened_with_its_encoding():
    places = [
        f"{path.relative_to(REPO)}:{line}"
        for folder in ("data_prep", "launch", "recipes")
        for path in sorted((REPO / folder).rglob("*.py"))
        for line in unnamed(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert places == []


def test_a_file_without_one_is_seen():
    lines = ["p.read_text()", 'p.open("rb")', 'p.open("w")', 'p.write_text("a")', 'open(p, "r", encoding="utf-8")', 'open(p, "a")',
             'p.read_text("utf-8")', "write_text(p, text)", 'p.read_text(errors="replace")']  # fmt: skip
    assert unnamed(ast.parse("\n".join(lines))) == [1, 3, 4, 6, 9]
