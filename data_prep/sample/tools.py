"""Five file tools that work inside one scratch folder and answer every bad input with an error text.

`run` starts only `python FILE [WORD ...]` with FILE inside the folder. It limits time and output. It is no sandbox: a script
can do whatever its user can do.
"""

import contextlib
import os
import selectors
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

MAX_CHARS = 4_000  # per tool result
MAX_BYTES = 1_000_000  # per file read or written
TIMEOUT_S = 20.0
# PYTHONDONTWRITEBYTECODE keeps __pycache__ out of list_files and search.
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "PYTHONUTF8": "1", "PYTHONHASHSEED": "0",
               "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip
PYTHON_TYPES: dict[str, type[Any]] = {"string": str, "integer": int, "boolean": bool}


def _schema(name: str, description: str, required: dict[str, str], optional: dict[str, str]) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in (required | optional).items()}
    parameters = {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


# Descriptions are short because every record repeats the tools.
TOOLS: list[dict[str, Any]] = [
    _schema("list_files", "List", {"path": "string"}, {}),
    _schema("read_file", "Get", {"path": "string"}, {"limit": "integer"}),
    _schema("write_file", "Put", {"path": "string", "content": "string"}, {}),
    _schema("search", "Find", {"pattern": "string", "path": "string"}, {"ignore_case": "boolean"}),
    _schema("run", "Run", {"command": "string"}, {}),
]
_PARAMETERS: dict[str, dict[str, Any]] = {
    tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS
}  # fmt: skip


class ToolError(Exception):
    """A failure that the agent reads as `error: <text>`."""


def call(name: str, arguments: dict[str, Any], root: Path) -> str:
    """Run one tool inside `root` and return its text. The text of a failure starts with `error: `."""
    root = root.resolve()
    try:
        _check(name, arguments)
        text = _FUNCTIONS[name](root, **arguments)
    except ToolError as error:
        text = f"error: {error}"
    except OSError as error:  # failures that no tool checks for, for example a name that is too long
        text = f"error: {error.strerror}"
    # An argument quoted in an error may contain a lone surrogate, which UTF-8 cannot encode.
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]}\n[cut]"


def _check(name: str, arguments: dict[str, Any]) -> None:
    """Raise `ToolError` if the call does not match the tool's schema."""
    if not isinstance(name, str) or name not in _PARAMETERS:
        raise ToolError(f"unknown tool: {name}")
    if not isinstance(arguments, dict):
        raise ToolError("arguments must be an object")
    parameters = _PARAMETERS[name]
    for key in parameters["required"]:
        if key not in arguments:
            raise ToolError(f"missing argument: {key}")
    for key, value in arguments.items():
        if key not in parameters["properties"]:
            raise ToolError(f"unknown argument: {key}")
        kind = parameters["properties"][key]["type"]
        if type(value) is not PYTHON_TYPES[kind]:  # not isinstance: True must not pass as an integer
            raise ToolError(f"{key} must be of type {kind}")
        if kind == "string" and ("\0" in value or value != value.encode("utf-8", "replace").decode("utf-8")):
            raise ToolError(f"{key} must be UTF-8 text without NUL")


def _inside(root: Path, path: str) -> Path:
    """Return the path below `root`. Raise `ToolError` for absolute paths, `..` and symbolic links anywhere in the path."""
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts:
        raise ToolError(f"outside the folder: {path}")
    target = root
    for part in parts.parts:
        target = target / part
        if target.is_symlink():
            raise ToolError(f"outside the folder: {path}")
    return target


def _text(file: Path, path: str) -> str:
    if not file.is_file():  # also rejects a pipe, which would block
        raise ToolError(f"no such file: {path}")
    if file.stat().st_size > MAX_BYTES:
        raise ToolError(f"too large: {path}")
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise ToolError(f"not UTF-8 text: {path}") from None


def _lines(text: str) -> list[str]:
    return text.removesuffix("\n").split("\n") if text else []


def _list_files(root: Path, path: str) -> str:
    """Return the sorted names, one per line; folder names end with a slash. An empty folder gives an empty text."""
    folder = _inside(root, path)
    if not folder.is_dir():
        raise ToolError(f"no such folder: {path}")
    return "\n".join(sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in folder.iterdir()))


def _read_file(root: Path, path: str, limit: int | None = None) -> str:
    """Return the file's lines, or its first `limit` lines, without the last newline."""
    if limit is not None and limit < 1:
        raise ToolError("limit must be at least 1")
    return "\n".join(_lines(_text(_inside(root, path), path))[:limit])


def _write_file(root: Path, path: str, content: str) -> str:
    """Write the text with a final newline. Create missing folders."""
    file = _inside(root, path)
    if file.exists() and not file.is_file():
        raise ToolError(f"not a file: {path}")
    data = content.encode("utf-8")
    if len(data) > MAX_BYTES:
        raise ToolError(f"too large: {path}")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data if not data or data.endswith(b"\n") else data + b"\n")
    return "ok"


def _search(root: Path, pattern: str, path: str, ignore_case: bool = False) -> str:
    """Return `file:line number:line` for every line that contains the plain-text pattern. No match gives an empty text."""
    start = _inside(root, path)
    if not start.exists():
        raise ToolError(f"no such file: {path}")
    files = [start] if start.is_file() else sorted(f for f in start.rglob("*") if f.is_file() and not f.is_symlink())
    wanted = pattern.casefold() if ignore_case else pattern
    hits = []
    for file in files:
        name = file.relative_to(root).as_posix()
        try:
            lines = _lines(_text(file, name))
        except ToolError:  # binary and huge files are not searched
            continue
        for number, line in enumerate(lines, 1):
            if wanted in (line.casefold() if ignore_case else line):
                hits.append(f"{name}:{number}:{line}")
    return "\n".join(hits)


def _run(root: Path, command: str) -> str:
    """Return the output of `python FILE [WORD ...]` without the last newline. Raise `ToolError` for a nonzero exit code."""
    try:
        words = shlex.split(command)
    except ValueError:
        raise ToolError("command has an open quote") from None
    if not words or words[0] != "python":
        raise ToolError(f"no such program: {words[0] if words else ''}")
    name = words[1] if len(words) > 1 else ""
    script = _inside(root, name)
    if not script.is_file():
        raise ToolError(f"no such file: {name}")
    # Use the full path: a file named like a Python option must not be read as one.
    code, output = _start([sys.executable, str(script), *words[2:]], root)
    text = output.decode("utf-8", "replace")
    for place, mark in ((f"{root}/", ""), (str(root), "."), (sys.prefix, "python"), (sys.base_prefix, "python")):
        text = text.replace(place, mark)
    text = text.removesuffix("\n")
    if code != 0:
        raise ToolError(f"exit {code}\n{text}".rstrip("\n"))
    return text


def _start(words: list[str], root: Path) -> tuple[int, bytes]:
    """Run the program in its own process group, which is killed before this call returns."""
    deadline = time.monotonic() + TIMEOUT_S
    process = subprocess.Popen(
        words, cwd=root, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        output = _read(process.stdout.fileno(), deadline)
        return process.wait(max(0.0, deadline - time.monotonic())), output
    except subprocess.TimeoutExpired:
        raise ToolError(f"timed out after {TIMEOUT_S:g} s") from None
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def _read(source: int, deadline: float) -> bytes:
    """Return the pipe's bytes up to its end. Raise `ToolError` if there are too many, `TimeoutExpired` at the deadline."""
    output = b""
    with selectors.DefaultSelector() as selector:
        selector.register(source, selectors.EVENT_READ)
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not selector.select(left):
                raise subprocess.TimeoutExpired("run", TIMEOUT_S)
            chunk = os.read(source, 65_536)
            if not chunk:
                return output
            output += chunk
            if len(output) > 4 * MAX_CHARS:  # a character takes up to four bytes
                raise ToolError("too much output")


_FUNCTIONS: dict[str, Callable[..., str]] = {
    "list_files": _list_files, "read_file": _read_file, "write_file": _write_file, "search": _search, "run": _run,
}  # fmt: skip
