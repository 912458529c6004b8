"""Comparison of an installed slime and Megatron-LM with the contract.

Their sources are parsed, not imported, so a node answers within a second and without a GPU. Only the flags need slime itself:
`flags` reads them from slime's parser.
"""

import ast
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launch.slime.contract import MOVED, NEW, Kind, Touch


def broken(roots: dict[str, str], touches: Sequence[Touch]) -> list[str]:
    """Return one line for each requirement that the checkouts do not meet. roots: the folders of `slime` and `megatron`."""
    missing = [name for name, folder in roots.items() if not Path(folder).is_dir()]
    return [f"no folder {roots[name]}" for name in missing] + [
        f"{touch.path}: {fault} ({touch.purpose})"
        for touch in touches
        if touch.root not in missing
        and (touch.path not in NEW or Path(roots[touch.root], touch.path).is_file())
        and (fault := _fault(touch, _tree(_file(Path(roots[touch.root]), touch.path))))
    ]


def _file(root: Path, path: str) -> Path:
    """Return the module's file, at its earlier place in an older version."""
    earlier = MOVED.get(path)
    return root / (earlier if earlier and not (root / path).is_file() else path)


@functools.cache
def _tree(path: Path) -> ast.Module | None:
    try:
        return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None


def _fault(touch: Touch, tree: ast.Module | None) -> str:
    if tree is None:
        return "no such module"
    match touch.kind:
        case Kind.exists:
            return "" if _exists(tree, touch.name) else f"has no {touch.name}"
        case Kind.takes:
            found = [_parameters(node) for node in _named(tree, touch.name) if isinstance(node, ast.FunctionDef)]
            return _mismatch(f"function {touch.name}", "takes", touch.wanted, found)
        case Kind.calls:
            found = [_arguments(node) for node in _calls(tree) if ast.unparse(node.func) == touch.name]
            return _mismatch(f"call of {touch.name}", "hands it", touch.wanted, found)
        case Kind.says:
            return "" if any(touch.wanted in text for text in _texts(tree)) else f"does not say '{touch.wanted}'"


def _mismatch(what: str, does: str, wanted: str, found: list[str]) -> str:
    """Return why none of the found parameter or argument lists is the wanted one, or an empty text if one is."""
    if wanted in found:
        return ""
    return f"the {what} {does} ({found[-1]}), not ({wanted})" if found else f"has no {what}"


def _exists(tree: ast.Module, dotted: str) -> bool:
    if [*_named(tree, dotted)]:
        return True
    # Otherwise it may be an attribute that the class's methods set.
    owner, _, name = dotted.rpartition(".")
    return any(
        isinstance(node, ast.Attribute)
        and node.attr == name
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
        for scope in (_named(tree, owner) if owner else ())
        for node in ast.walk(scope)
    )


def _named(tree: ast.AST, dotted: str) -> Iterator[ast.AST]:
    """Yield the definitions of a dotted name, including those inside `if` and `try`."""
    first, _, rest = dotted.partition(".")
    for node in _body(tree):
        if first in _names(node):
            if not rest:
                yield node
            else:
                yield from _named(node, rest)


def _body(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        yield child
        if isinstance(child, ast.If | ast.Try | ast.ExceptHandler | ast.With):
            yield from _body(child)


def _names(node: ast.AST) -> list[str]:
    """Return the names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _parameters(node: ast.FunctionDef) -> str:
    """Return the parameters as a signature shows them, without `self`, annotations and defaults."""
    a = node.args
    plain = [p.arg for p in (*a.posonlyargs, *a.args) if p.arg != "self"]
    star = [f"*{a.vararg.arg}"] if a.vararg else ["*"] if a.kwonlyargs else []
    return ", ".join([*plain, *star, *(p.arg for p in a.kwonlyargs), *([f"**{a.kwarg.arg}"] if a.kwarg else [])])


def _calls(tree: ast.Module) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def _arguments(call: ast.Call) -> str:
    named = [f"{k.arg}={ast.unparse(k.value)}" if k.arg else f"**{ast.unparse(k.value)}" for k in call.keywords]
    return ", ".join([*(ast.unparse(argument) for argument in call.args), *named])


def _texts(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)


class _ParserComplete(Exception):
    """Stops slime as soon as its parser is complete."""


def flags(on_cpu: bool) -> list[str]:
    """Return every flag that slime and Megatron-LM accept, read from slime's own parser. Call this in slime's Python."""
    import argparse
    from unittest import mock

    if on_cpu:
        from launch.slime.hooks import cpu

        cpu.install()
    from slime.utils.arguments import parse_args

    found: set[str] = set()
    parse_known_args = argparse.ArgumentParser.parse_known_args

    def record_flags(self: argparse.ArgumentParser, *given: Any, **named: Any) -> Any:
        names = {name for action in self._actions for name in action.option_strings}
        found.update(names)
        if "--tensor-model-parallel-size" in names:
            raise _ParserComplete
        return parse_known_args(self, *given, **named)

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", record_flags),
        mock.patch.object(sys, "argv", ["train_async.py", "--debug-train-only"]),
    ):
        try:
            parse_args()
        except _ParserComplete:
            return sorted(found)
    raise RuntimeError("slime's parse_args parsed no flags of Megatron-LM")
