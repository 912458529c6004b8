"""Test modules that tests copy into a folder of their own and run there; pytest does not collect them here."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from recipes.paths import REPO

MARKERS = ("run", "slow", "contract")


def folder_of(folder: Path, *names: str) -> Path:
    """A folder with these modules as tests of its own."""
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n" + "".join(f"    {name}\n" for name in MARKERS))
    for name in names:
        shutil.copyfile(Path(__file__).with_name(f"{name}.py"), folder / f"test_{name}.py")
    return folder


def environment() -> dict[str, str]:
    """In which a pytest finds this checkout, and nothing of a pytest around it."""
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"PYTHONPATH": str(REPO)}


def pytest_on(folder: Path, name: str, *words: str) -> subprocess.CompletedProcess[str]:
    """pytest on one of these modules."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *words]
    return subprocess.run(command, cwd=folder_of(folder, name), env=environment(), capture_output=True, text=True)
