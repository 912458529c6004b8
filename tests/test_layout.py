"""The layout of the checkout: who imports whom, how many files a folder has, and that each README lists its folder."""

import ast
import re
import subprocess
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from recipes.paths import REPO

PACKAGES = ("recipes", "data_prep", "launch")
LISTED = subprocess.run(
    ["git", "ls-files", "*.py"], cwd=REPO, capture_output=True, text=True, check=True
).stdout.split()
FILES = [Path(name) for name in LISTED if name.split("/")[0] in PACKAGES]
MODULES = {".".join(path.with_suffix("").parts): path for path in FILES}
FOLDERS = sorted({path.parent for path in FILES if path.name != "__init__.py"})


def imported(path):
    """The modules of the project that a file imports, wherever in it."""
    for node in ast.walk(ast.parse((REPO / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES:
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                yield whole if whole in MODULES else node.module


def room(module):
    """`launch.run` of `launch.run.metrics`; a module at the top of its package is no room's."""
    parts = module.split(".")
    return ".".join(parts[:2]) if len(parts) > 2 else None


def arrows():
    found = defaultdict(set)
    for module, path in MODULES.items():
        for other in imported(path):
            a, b = room(module), room(f"{other}.__init__" if f"{other}.__init__" in MODULES else other)
            if a and b and a != b:
                found[a].add(b)
    return found


def test_no_two_rooms_import_each_other():
    TopologicalSorter(arrows()).prepare()  # raises CycleError


def test_the_packages_import_downwards():
    for module, path in MODULES.items():
        below = {"recipes": {"recipes"}, "data_prep": {"recipes", "data_prep"}}.get(module.split(".")[0], set(PACKAGES))
        assert {name.split(".")[0] for name in imported(path)} <= below, path


def test_launch_imports_what_its_readme_allows():
    rows = re.findall(r"^\| \[`(\w+)/`\]\([^)]*\) \| .* \| (.*) \|$", (REPO / "launch" / "README.md").read_text(), re.M)
    allowed = {f"launch.{name}": {f"launch.{other}" for other in re.findall(r"`(\w+)", names)} for name, names in rows}
    assert {name for name in map(room, MODULES) if name and name.startswith("launch.")} == {*allowed}
    for name, others in arrows().items():
        if name in allowed and name != "launch.cli":
            assert {other for other in others if other.startswith("launch.")} <= allowed[name], name


def test_folders_are_small():
    assert len([path for path in FILES if path.parent == Path("launch") and path.name != "__init__.py"]) <= 6
    for folder in FOLDERS:
        assert len([path for path in FILES if path.parent == folder and path.name != "__init__.py"]) <= 12, folder


@pytest.mark.parametrize("folder", [f for f in FOLDERS if len(f.parts) <= 2], ids=str)
def test_a_readme_lists_every_file_of_its_folder(folder):
    text = (REPO / folder / "README.md").read_text(encoding="utf-8")
    inside = [path.relative_to(folder) for path in FILES if folder in path.parents and path.name != "__init__.py"]
    own = [p for p in inside if len(p.parts) == 1 or folder.parts != (folder.parts[0],)]
    assert [str(p) for p in own if f"`{p.name}`" not in text and f"`{p}`" not in text] == []


def test_no_two_files_of_one_package_have_one_name():
    """Save for those that both engines have."""
    names = defaultdict(list)
    for path in FILES:
        names[path.name].append(str(path))
    twice = {name for name, paths in names.items() if len(paths) > 1}
    assert twice <= {"__init__.py", "engine.py", "cpu.py", "limi.py", "trajectory.py"}
