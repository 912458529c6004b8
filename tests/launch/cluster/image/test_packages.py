"""What slime's images lack is brought along once, under `cluster.root`, and nothing that a job imports is missing from the list."""

import ast
import os
import subprocess
import sys

import pytest

from launch.cluster.image import packages
from launch.cluster.image.pins import PACKAGES
from recipes.errors import PreflightError
from recipes.paths import REPO

OURS = ("launch", "data_prep", "recipes")
ELSEWHERE = {"megatron", "slime"}  # checkouts, which the contract compares
ON_GPUS = {"flash_attn"}  # of the embedded engine, where gpu.attention names it
WITH_ANOTHER = {"pydantic_core"}  # installed with pydantic


def imported() -> set[str]:
    """Return the packages that the project's files import."""
    found = set()
    for room in OURS:
        for path in (REPO / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    found |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {*OURS}


def test_make_check_imports_whatever_the_project_does():
    assert imported() - ELSEWHERE - ON_GPUS - WITH_ANOTHER <= PACKAGES.keys()


def test_the_lock_has_the_versions_that_are_tested():
    locked = {line for line in packages.LOCK.read_text().splitlines() if not line.startswith("#")}
    assert locked <= {*(REPO / "constraints-slime.txt").read_text().splitlines()}


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """A Python whose pip does what the function's script says, with its target folder as $target."""

    def install(script: str) -> None:
        python = tmp_path / "python3"
        python.write_text(
            f'#!/bin/bash\nfor word in "$@"; do [[ $word != --target=* ]] || target=${{word#--target=}}; done\n{script}\n'
        )
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))
        monkeypatch.setattr(sys, "path", [*sys.path])

    return install


def test_they_are_installed_once_and_found_before_the_image_s_own(tmp_path, pip):
    pip('echo "x = 1" > "$target/brought_here.py"; echo >> "$0.count"')
    for _ in range(2):
        packages.bring(str(tmp_path))
    assert sys.path[1] == str(packages.folder(str(tmp_path)))
    assert (tmp_path / "python3.count").read_text() == "\n", "once"
    assert sys.path.count(sys.path[1]) == 1


def test_every_process_of_a_job_finds_them_behind_the_project_once_they_are_there(tmp_path, pip, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert packages.python_path(str(tmp_path), "/a", "/b") == "/a:/b"
    pip("true")
    packages.bring(str(tmp_path))
    assert packages.python_path(str(tmp_path), "/a") == f"/a:{packages.folder(str(tmp_path))}"


def test_a_process_of_a_job_keeps_the_folders_from_which_this_one_imports(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"/a{os.pathsep}/of_ray{os.pathsep}")
    assert packages.python_path(str(tmp_path), "/a") == f"/a{os.pathsep}/of_ray"


def test_what_pip_cannot_install_is_an_error_with_the_command_and_leaves_nothing(tmp_path, pip):
    pip('echo half > "$target/half.py"; echo "No matching distribution found for hydra-core" >&2; exit 1')
    with pytest.raises(PreflightError, match="No matching distribution found for hydra-core") as raised:
        packages.bring(str(tmp_path))
    assert f"--target={packages.folder(str(tmp_path))}" in raised.value.fix
    assert not packages.folder(str(tmp_path)).exists()
    assert list((tmp_path / "packages").iterdir()) == []


def test_this_environment_lacks_nothing_and_a_bare_python_is_no_image():
    assert not packages.lacks()
    program = "import sys; sys.path.insert(0, '.'); from launch.cluster.image import packages; print(packages.lacks())"
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-S", "-c", program], cwd=REPO, env=bare, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
