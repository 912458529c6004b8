"""Scripted plans: each family draws its parameters and yields the turns of one trajectory.

The user's request or a tool's answer states every name and value that the next call needs, so the history determines that
call. Requests and the texts before calls are fixed phrases, so a small model learns them from few trajectories.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

Call = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Turn:
    """One message of the user or the assistant. The script receives the result texts of its calls, in order."""

    role: Literal["user", "assistant"]
    text: str
    calls: tuple[Call, ...] = ()


Script = Generator[Turn, list[str], None]


@dataclass(frozen=True)
class Plan:
    """The files that the scratch folder starts with, by path, and the turns to play, in order."""

    files: dict[str, str]
    script: Script


WORDS = ("oak", "elm", "ash", "fir", "red", "blue", "green", "gold", "cat", "dog", "fox", "owl")
GERMAN, CHINESE, GREEK = ("Grüße", "Köln", "Straße"), ("你好", "世界", "朋友"), ("γεια", "κόσμε", "θάλασσα")
EMOJI = ("🌲", "🎉", "🚀", "🦊")
KEYS = ("port", "size", "level", "speed")
TEXTS = ("notes.txt", "todo.txt", "list.txt", "plan.txt", "log.txt")
CONFIGS = ("app.ini", "site.ini", "game.ini")
TABLES = ("data.csv", "cost.csv", "sales.csv")
REPORTS = ("report.txt", "total.txt", "all.txt")
MODULES = ("tool", "part", "unit")
CHECKS = ("check.py", "test.py")
FOLDERS = ("docs", "data", "old")

READ, SEARCH, RUN, LOOK, WRITE = "I read it.", "I search.", "I run it.", "I look around.", ""

# A script that sums the last word or cell of every line.
SUM = "import sys\nprint(sum(int(line.replace(',', ' ').split()[-1]) for line in open(sys.argv[1])))\n"
CHECK = """\
have = dict(line.strip().split(" = ") for line in open({path!r}))
for key, value in {wanted!r}.items():
    if have[key] != value:
        print(key, "must be", value)
        raise SystemExit(1)
"""


def user(text: str) -> Turn:
    return Turn("user", text)


def act(text: str, *calls: Call) -> Turn:
    return Turn("assistant", text, calls)


def done(text: str) -> Turn:
    return Turn("assistant", text)


def listing(path: str) -> Call:
    return "list_files", {"path": path}


def read(path: str) -> Call:
    return "read_file", {"path": path}


def head(path: str, limit: int) -> Call:
    return "read_file", {"path": path, "limit": limit}


def write(path: str, content: str) -> Call:
    return "write_file", {"path": path, "content": content}


def search(pattern: str, path: str) -> Call:
    return "search", {"pattern": pattern, "path": path}


def run(command: str) -> Call:
    return "run", {"command": command}


def numbers(rng: Random, count: int) -> list[str]:
    """Return `count` distinct numbers from 1 to 99."""
    return [str(number) for number in rng.sample(range(1, 100), count)]


def lines(*items: str) -> str:
    return "".join(f"{item}\n" for item in items)


def set_value(text: str, key: str, value: str) -> str:
    return "\n".join(f"{key} = {value}" if line.startswith(f"{key} = ") else line for line in text.split("\n"))


def config(rng: Random) -> Plan:
    """Two requests; each changes one value of a configuration."""
    path, keys, values = rng.choice(CONFIGS), rng.sample(KEYS, 2), numbers(rng, 4)
    files = {path: lines(*(f"{key} = {value}" for key, value in zip(keys, values[:2], strict=True)))}

    def script() -> Script:
        for key, value in zip(keys, values[2:], strict=True):
            yield user(f"In {path} set {key} to {value}.")
            (text,) = yield act(READ, read(path))
            yield act(WRITE, write(path, set_value(text, key, value)))
            yield done(f"{path} has {key} = {value}.")

    return Plan(files, script())


def rename(rng: Random) -> Plan:
    """Parallel reads, parallel writes, then a search without a match (empty answer)."""
    (old, new, *others), paths, values = rng.sample(WORDS, 4), rng.sample(TEXTS, 2), numbers(rng, 2)
    contents = (lines(f"{old} {values[0]}", others[0]), lines(others[1], f"{old} {values[1]}"))
    files = dict(zip(paths, contents, strict=True))

    def script() -> Script:
        yield user(f"Replace {old} with {new} in {paths[0]} and {paths[1]}.")
        texts = yield act(READ, *(read(path) for path in paths))
        changed = [text.replace(old, new) for text in texts]
        yield act(WRITE, *(write(path, text) for path, text in zip(paths, changed, strict=True)))
        yield act(SEARCH, search(old, "."))
        yield done(f"No {old} is left.")

    return Plan(files, script())


def total(rng: Random) -> Plan:
    """Two requests to sum the last column of a table and write the sum to a report."""
    tables, reports = rng.sample(TABLES, 2), rng.sample(REPORTS, 2)
    rows = zip(rng.sample(WORDS, 4), numbers(rng, 4), strict=True)
    cells = [f"{word},{number}" for word, number in rows]
    files = {"sum.py": SUM, tables[0]: lines(*cells[:2]), tables[1]: lines(*cells[2:])}

    def script() -> Script:
        for table, report in zip(tables, reports, strict=True):
            yield user(f"Run sum.py on {table} and write the sum to {report}.")
            (text,) = yield act(RUN, run(f"python sum.py {table}"))
            yield act(WRITE, write(report, text))
            yield done(f"The sum of {table} is {text}.")

    return Plan(files, script())


def find(rng: Random) -> Plan:
    """Search, read, edit. The word is capitalised in the file, so the search ignores case."""
    (old, new, *others), paths, (number,) = rng.sample(WORDS, 4), rng.sample(TEXTS, 3), numbers(rng, 1)
    files = dict(
        zip(paths, (lines(f"{old.title()} {number}", others[0]), lines(others[0]), lines(others[1])), strict=True)
    )

    def script() -> Script:
        yield user(f"Find {old} in any case and replace it with {new}.")
        (hit,) = yield act(SEARCH, ("search", {"pattern": old, "path": ".", "ignore_case": True}))
        path = hit.split(":")[0]
        (text,) = yield act(READ, read(path))
        yield act(WRITE, write(path, text.replace(old.title(), new)))
        yield done(f"{path} has {new}.")

    return Plan(files, script())


def check(rng: Random) -> Plan:
    """A check that fails once or twice, each time for one value. It prints nothing when it passes."""
    path, checker, keys, values = rng.choice(CONFIGS), rng.choice(CHECKS), rng.sample(KEYS, 2), numbers(rng, 4)
    wanted = dict(zip(keys[: rng.randint(1, 2)], values[2:], strict=False))
    now = lines(*(f"{key} = {value}" for key, value in zip(keys, values[:2], strict=True)))
    files = {path: now, checker: CHECK.format(path=path, wanted=wanted)}

    def script() -> Script:
        yield user(f"Run {checker} and fix {path} until it passes.")
        (result,) = yield act(RUN, run(f"python {checker}"))
        while result:
            key, value = result.split("\n")[1].split(" must be ")
            (text,) = yield act(READ, read(path))
            yield act(WRITE, write(path, set_value(text, key, value)))
            (result,) = yield act(RUN, run(f"python {checker}"))
        yield done(f"{checker} passes.")

    return Plan(files, script())


def notes(rng: Random) -> Plan:
    """Three parallel reads of one-line notes in several scripts, collected in one file."""
    paths, target, words = rng.sample(TEXTS, 3), rng.choice(REPORTS), rng.sample(WORDS, 3)
    foreign = [rng.choice(choice) for choice in (GERMAN, CHINESE, GREEK)]
    contents = (lines(f"{word} {note}") for word, note in zip(words, foreign, strict=True))
    files = dict(zip(paths, contents, strict=True))

    def script() -> Script:
        yield user(f"Collect {paths[0]}, {paths[1]} and {paths[2]} in {target}.")
        texts = yield act(READ, *(read(path) for path in paths))
        yield act(WRITE, write(target, "\n".join(texts)))
        yield done(f"{target} has 3 lines.")

    return Plan(files, script())


def module(rng: Random) -> Plan:
    """Create a module and a script that imports it, then change the module."""
    name, words = rng.choice(MODULES), [rng.choice(WORDS), rng.choice(EMOJI)]

    def script() -> Script:
        yield user(f"Create {name}.py with word = '{words[0]}' and main.py that prints it.")
        main = f"from {name} import word\nprint(word)"
        yield act(WRITE, write(f"{name}.py", f"word = '{words[0]}'"), write("main.py", main))
        (text,) = yield act(RUN, run("python main.py"))
        yield done(f"main.py prints {text}.")
        yield user(f"Change {name}.py to word = '{words[1]}' and run main.py.")
        yield act(WRITE, write(f"{name}.py", f"word = '{words[1]}'"))
        (text,) = yield act(RUN, run("python main.py"))
        yield done(f"main.py prints {text}.")

    return Plan({}, script())


def missing(rng: Random) -> Plan:
    """A read that fails, two listings that find the file, then a read that succeeds."""
    path, folder, limit = rng.choice(TEXTS), rng.choice(FOLDERS), rng.randint(1, 2)
    rows = zip(rng.sample(WORDS, 3), numbers(rng, 3), strict=True)
    files = {f"{folder}/{path}": lines(*(f"{word} {number}" for word, number in rows))}

    def script() -> Script:
        yield user(f"Read {path} with limit {limit}.")
        yield act(READ, head(path, limit))
        (names,) = yield act(LOOK, listing("."))
        found = names.removesuffix("/")
        (names,) = yield act(LOOK, listing(found))
        (text,) = yield act(READ, head(f"{found}/{names}", limit))
        yield done(f"{found}/{names}: {text.replace(chr(10), ', ')}.")

    return Plan(files, script())


def peek(rng: Random) -> Plan:
    """The shortest plan: two parallel reads."""
    paths, words = rng.sample(TEXTS, 2), rng.sample(WORDS, 2)
    files = {path: lines(word) for path, word in zip(paths, words, strict=True)}

    def script() -> Script:
        yield user(f"Read {paths[0]} and {paths[1]}.")
        texts = yield act(READ, *(read(path) for path in paths))
        yield done(f"{texts[0]}, {texts[1]}.")

    return Plan(files, script())


def tour(rng: Random) -> Plan:
    """The longest plan: four requests about the same five files, 60 messages."""
    (old, new), values, folder = rng.sample(WORDS, 2), numbers(rng, 5), rng.choice(FOLDERS)
    files = {f"{folder}/{path}": lines(f"{old} {value}") for path, value in zip(TEXTS, values, strict=True)}

    def script() -> Script:
        yield user(f"Replace {old} with {new} in every file of {folder}.")
        (names,) = yield act(LOOK, listing(folder))
        paths = [f"{folder}/{name}" for name in names.split("\n")]
        for path in paths:
            (text,) = yield act(READ, read(path))
            yield act(WRITE, write(path, text.replace(old, new)))
        yield act(SEARCH, search(old, folder))
        yield done(f"No {old} is left.")
        yield user(f"Read every file of {folder} with limit 1.")
        for path in paths:
            yield act(READ, head(path, 1))
        yield done(f"I read {len(paths)} files.")
        yield user(f"Run sum.py on every file of {folder} and write the sums to report.txt.")
        sums = []
        for path in paths:
            sums += yield act(RUN, run(f"python sum.py {path}"))
        yield act(WRITE, write("report.txt", "\n".join(sums)))
        yield done("report.txt has the sums.")
        yield user(f"Read report.txt and {paths[0]}, then search {new} in {folder}.")
        yield act(READ, read("report.txt"), read(paths[0]))
        yield act(SEARCH, search(new, folder))
        yield done(f"{new} is in every file of {folder}.")

    return Plan({"sum.py": SUM, **files}, script())


Family = Callable[[Random], Plan]
TRAIN: tuple[Family, ...] = (
    peek, *[config] * 2, *[rename] * 2, *[total] * 2, *[find] * 2, *[check] * 3, *[notes] * 3, *[module] * 2,
    *[missing] * 2, tour,
)  # fmt: skip
HELDOUT: tuple[Family, ...] = (config, find, check, notes)
