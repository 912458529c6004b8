"""The committed sample: reproducible, in the schema, of the promised coverage; its tools: safe, errors as texts."""

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest

from data_prep.sample import make, tools

FOLDER = Path(make.__file__).parent
Record = dict[str, Any]


def load(name: str) -> list[Record]:
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


TRAIN, HELDOUT = load("train.jsonl"), load("heldout.jsonl")
BOTH = TRAIN + HELDOUT


def calls(record: Record) -> list[dict[str, Any]]:
    return [call for message in record["messages"] for call in message.get("tool_calls", [])]


def texts(record: Record, role: str) -> list[str]:
    return [message["content"] for message in record["messages"] if message["role"] == role]


def size(record: Record) -> int:
    """Characters of the messages as JSON, without the system message."""
    return len(json.dumps(record["messages"][1:], ensure_ascii=False))


def test_the_script_reproduces_the_committed_files(tmp_path: Path) -> None:
    make.main(["--seed", "0", "--out", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heldout.jsonl", "train.jsonl"]
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (FOLDER / path.name).read_bytes()


def test_another_seed_gives_another_sample(tmp_path: Path) -> None:
    make.main(["--seed", "1", "--out", str(tmp_path)])
    assert (tmp_path / "train.jsonl").read_bytes() != (FOLDER / "train.jsonl").read_bytes()


@pytest.mark.parametrize("record", BOTH, ids=lambda record: texts(record, "user")[0])
def test_schema(record: Record) -> None:
    messages = record["messages"]
    parameters = {tool["function"]["name"]: tool["function"]["parameters"] for tool in record["tools"]}
    assert set(record) == {"messages", "tools"} and record["tools"] == tools.TOOLS
    assert [m["role"] for m in messages[:2]] == ["system", "user"] and texts(record, "system") == [make.SYSTEM]
    assert [call["id"] for call in calls(record)] == [f"call_{n}" for n in range(1, len(calls(record)) + 1)]
    assert messages[-1]["role"] == "assistant" and messages[-1]["content"] and "tool_calls" not in messages[-1]
    waiting: list[tuple[str, str]] = []
    for message in messages:
        assert isinstance(message["content"], str) and message["content"] == message["content"].strip()
        if message["role"] == "tool":
            assert set(message) == {"role", "tool_call_id", "name", "content"}
            assert (message["tool_call_id"], message["name"]) == waiting.pop(0)
            continue
        assert not waiting and set(message) <= {"role", "content", "tool_calls"}
        for call in message.get("tool_calls", []):
            function = call["function"]
            assert message["role"] == "assistant" and call["type"] == "function"
            jsonschema.validate(function["arguments"], parameters[function["name"]])
            waiting.append((call["id"], function["name"]))


def test_counts_and_sizes() -> None:
    assert (len(TRAIN), len(HELDOUT)) == (20, 4)
    lengths = [len(record["messages"]) for record in TRAIN]
    assert (min(lengths), max(lengths)) == (6, 60)
    sizes = [size(record) for record in TRAIN]
    assert sum(sizes) <= 45_000 and min(sizes) <= 700 and 10 * min(sizes) <= max(sizes) <= 9_000
    assert len(json.dumps(tools.TOOLS, separators=(",", ":"))) < 1_100


def test_coverage() -> None:
    def holders(wanted: Any) -> int:
        return sum(map(bool, map(wanted, TRAIN)))

    def recovers(record: Record) -> bool:
        """An error is followed by a call that succeeds."""
        failed = [content.startswith("error: ") for content in texts(record, "tool")]
        return True in failed and not failed[-1]

    def has_type(kind: type) -> Any:
        return lambda record: any(type(v) is kind for c in calls(record) for v in c["function"]["arguments"].values())

    parallel = {len(message.get("tool_calls", [])) for record in TRAIN for message in record["messages"]}
    assert parallel == {0, 1, 2, 3}
    assert holders(lambda r: any(len(message.get("tool_calls", [])) > 1 for message in r["messages"])) >= 3
    assert holders(recovers) >= 3
    assert holders(lambda r: "" in texts(r, "tool")) >= 3
    assert holders(lambda r: 2 <= len(texts(r, "user")) <= 4) >= 5
    for script in ("[a-zA-Z][äöüß]", "[\u4e00-\u9fff]", "[\u03b1-\u03ce]", "[\U0001f300-\U0001faff]"):
        assert holders(lambda r, script=script: re.search(script, json.dumps(r["messages"], ensure_ascii=False))) >= 1
    assert holders(lambda r: not json.dumps(r["messages"], ensure_ascii=False).isascii()) >= 3
    assert holders(has_type(int)) >= 3 and holders(has_type(bool)) >= 2 and holders(has_type(str)) == 20
    assert {bool(m["content"]) for record in TRAIN for m in record["messages"] if "tool_calls" in m} == {True, False}
    used = {call["function"]["name"] for record in TRAIN for call in calls(record)}
    assert used == {tool["function"]["name"] for tool in tools.TOOLS}
    assert {call["function"]["name"] for record in HELDOUT for call in calls(record)} <= used


def test_requests_are_distinct_and_histories_determine_the_next_turn() -> None:
    asked = [text for record in BOTH for text in texts(record, "user")]
    assert len(set(asked)) == len(asked)
    following: dict[str, Any] = {}
    for record in BOTH:
        for index, message in enumerate(record["messages"]):
            if message["role"] == "assistant":
                assert following.setdefault(json.dumps(record["messages"][:index]), message) == message


def test_arguments_repeat_the_history() -> None:
    """Every word of an argument stands in the history, but for those of two fixed phrases; contents are short."""
    fixed = {"python", "from", "import", "print"}
    for record in BOTH:
        known: set[str] = set()
        for message in record["messages"]:
            for call in message.get("tool_calls", []):
                values = call["function"]["arguments"].values()
                words = {word for value in values if value is not True for word in re.findall(r"\w+", str(value))}
                assert words <= known | fixed
                assert len(call["function"]["arguments"].get("content", "")) <= 80
            known |= {word for part in [message["content"]] for word in re.findall(r"\w+", part)}


def test_nothing_of_the_machine_is_in_the_sample() -> None:
    for name in ("train.jsonl", "heldout.jsonl"):
        assert not re.search(r'["\s=]/\w|/tmp|\d\d:\d\d', (FOLDER / name).read_text(encoding="utf-8"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A scratch folder with a few files; beside it a secret."""
    (tmp_path / "secret.txt").write_text("secret\n")
    (tmp_path / "secret.py").write_text("print('secret')\n")
    folder = tmp_path / "root"
    make.lay_out({"notes.txt": "oak\nElm\n", "docs/list.txt": "oak 你好\n"}, folder)
    (folder / "empty").mkdir()
    (folder / "bytes.bin").write_bytes(b"oak\xff")
    return folder


def script(root: Path, code: str) -> str:
    (root / "main.py").write_text(code, encoding="utf-8")
    return tools.call("run", {"command": "python main.py"}, root)


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("list_files", {"path": "."}, "bytes.bin\ndocs/\nempty/\nnotes.txt"),
        ("list_files", {"path": "empty"}, ""),
        ("read_file", {"path": "notes.txt"}, "oak\nElm"),
        ("read_file", {"path": "notes.txt", "limit": 1}, "oak"),
        ("write_file", {"path": "new/a.txt", "content": "oak"}, "ok"),
        ("search", {"pattern": "oak", "path": "."}, "docs/list.txt:1:oak 你好\nnotes.txt:1:oak"),
        ("search", {"pattern": "elm", "path": "."}, ""),
        ("search", {"pattern": "elm", "path": "notes.txt", "ignore_case": True}, "notes.txt:2:Elm"),
        ("fly", {}, "error: unknown tool: fly"),
        ("read_file", {}, "error: missing argument: path"),
        ("read_file", {"path": "notes.txt", "mode": "r"}, "error: unknown argument: mode"),
        ("read_file", {"path": 5}, "error: path must be of type string"),
        ("read_file", {"path": "notes.txt", "limit": True}, "error: limit must be of type integer"),
        ("read_file", {"path": "notes.txt", "limit": None}, "error: limit must be of type integer"),
        ("read_file", {"path": "notes.txt", "limit": 0}, "error: limit must be at least 1"),
        ("search", {"pattern": "a", "path": ".", "ignore_case": 1}, "error: ignore_case must be of type boolean"),
        ("read_file", {"path": "a\0"}, "error: path must be UTF-8 text without NUL"),
        ("write_file", {"path": "a.txt", "content": "\ud800"}, "error: content must be UTF-8 text without NUL"),
        ("read_file", {"path": "todo.txt"}, "error: no such file: todo.txt"),
        ("read_file", {"path": "docs"}, "error: no such file: docs"),
        ("read_file", {"path": "bytes.bin"}, "error: not UTF-8 text: bytes.bin"),
        ("read_file", {"path": "a" * 300}, "error: File name too long"),
        ("list_files", {"path": "notes.txt"}, "error: no such folder: notes.txt"),
        ("write_file", {"path": "docs", "content": ""}, "error: not a file: docs"),
        ("search", {"pattern": "oak", "path": "todo.txt"}, "error: no such file: todo.txt"),
        ("run", {"command": "ls"}, "error: no such program: ls"),
        ("run", {"command": ""}, "error: no such program: "),
        ("run", {"command": "python 'main.py"}, "error: command has an open quote"),
        ("run", {"command": "python"}, "error: no such file: "),
        ("run", {"command": "python -c 'print(1)'"}, "error: no such file: -c"),
    ],
)
def test_texts_of_the_tools(root: Path, name: str, arguments: dict[str, Any], text: str) -> None:
    assert tools.call(name, arguments, root) == text


def test_calls_of_no_known_shape_are_errors(root: Path) -> None:
    odd: Any = ["path"]
    assert tools.call("read_file", odd, root) == "error: arguments must be an object"
    assert tools.call(odd, {}, root).startswith("error: unknown tool")
    assert tools.call("read_file", {"path": "notes.txt", "\ud800": 1}, root) == "error: unknown argument: ?"


@pytest.mark.parametrize(
    "path", ["../secret.txt", "docs/../../secret.txt", "{outside}/secret.txt", "link", "way/secret.txt"]
)
def test_no_way_out_of_the_folder(root: Path, path: str) -> None:
    (root / "link").symlink_to(root.parent / "secret.txt")
    (root / "way").symlink_to(root.parent)
    path = path.format(outside=root.parent)
    refused = f"error: outside the folder: {path}"
    assert tools.call("read_file", {"path": path}, root) == refused
    assert tools.call("write_file", {"path": path, "content": "gone"}, root) == refused
    assert tools.call("search", {"pattern": "secret", "path": path}, root) == refused
    assert tools.call("list_files", {"path": path}, root) == refused
    assert tools.call("run", {"command": f"python {path.replace('.txt', '.py')}"}, root).startswith("error: outside")
    assert tools.call("search", {"pattern": "secret", "path": "."}, root) == ""
    assert (root.parent / "secret.txt").read_text() == "secret\n"


def test_run_hides_the_folder_and_the_environment(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_VALUE", "1")
    assert script(root, "import os\nprint(os.getcwd(), os.environ.get('SECRET_VALUE'))") == ". None"
    assert script(root, "1 / 0").startswith(
        'error: exit 1\nTraceback (most recent call last):\n  File "main.py", line 1'
    )
    assert script(root, "x = 1") == ""
    assert tools.call("run", {"command": "python main.py; echo $HOME > a.txt"}, root) == (
        "error: no such file: main.py;"
    )
    assert not (root / "a.txt").exists()


def test_run_ends_what_it_started(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "TIMEOUT_S", 1.0)
    start = time.monotonic()
    child = "import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    save = "open('pid.txt', 'w').write(str(child.pid))\n"
    assert script(root, child + save + "child.wait()") == "error: timed out after 1 s"
    assert script(root, "while True: print('x' * 99)") == "error: too much output"
    assert time.monotonic() - start < 20
    pid = int((root / "pid.txt").read_text())
    state = Path(f"/proc/{pid}/stat")
    for _ in range(100):  # a killed child stays a zombie until its new parent looks
        if not state.exists() or state.read_text().split(")")[-1].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail(f"process {os.fspath(state)} lives on")


def test_long_output_is_cut(root: Path) -> None:
    assert script(root, "print('y' * 5000)") == "y" * tools.MAX_CHARS + "\n[cut]"
