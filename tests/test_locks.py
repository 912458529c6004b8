"""The lock files: one version a package, alike but where SGLang's own dependencies rule a version out; and make's choice of one."""

import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.conftest import REPO
from tests.make import LOCKS, made, make

CPU, GPU = LOCKS
# What SGLang's own dependencies ask for otherwise: it names torch, tokenizers (which wants huggingface_hub below 2) and
# python-dateutil below 3; mistral-common wants numpy below 2.4.
UNLIKE = {"torch", "tokenizers", "huggingface-hub", "python-dateutil", "numpy"}
DRIVER = Path("/proc/driver/nvidia/version")


def pins(lock: str) -> list[tuple[str, Version]]:
    """Every line of a lock as its package and version; a line that is not one exact version fails."""
    lines = [line for line in (REPO / lock).read_text().splitlines() if not line.startswith("#")]
    return [(canonicalize_name(name), Version(version)) for name, version in (line.split("==") for line in lines)]


def named(*groups: str) -> set[str]:
    """The packages that groups of pyproject.toml name, with those of the groups that they include."""
    every = tomllib.loads((REPO / "pyproject.toml").read_text())["dependency-groups"]
    names: set[str] = set()
    for entry in (entry for group in groups for entry in every[group]):
        if isinstance(entry, dict):
            names |= named(entry["include-group"])
        else:
            names.add(canonicalize_name(Requirement(entry).name))
    return names


def would(environment: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """What make would run, were `environment` the virtual environment."""
    return make("-n", f"VENV={environment}", *words)


@pytest.mark.parametrize("lock", [CPU, GPU])
def test_a_lock_pins_once_every_package_that_make_installs(lock):
    names = [name for name, _ in pins(lock)]
    assert sorted(names) == sorted(set(names))
    assert named("run", "test", "sglang") <= set(names)


def test_the_locks_are_alike_but_for_what_sglang_asks_for():
    cpu, gpu = dict(pins(CPU)), dict(pins(GPU))
    assert {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]} == UNLIKE
    assert cpu.keys() - gpu.keys() == {"tzdata"}  # python-dateutil 4 wants it
    assert gpu["torch"] >= Version("2.11")
    assert not any(version.local for version in gpu.values())  # a build that one machine's index has


def test_make_installs_the_lock_that_it_is_told(tmp_path):
    gpu, cpu = (would(tmp_path / "new", "setup", f"LOCK={lock}").stdout for lock in (GPU, CPU))
    assert gpu.count(f"--constraint {GPU} ") == 2
    assert "--no-deps" not in gpu
    assert cpu.count(f"--constraint {CPU} ") == 2
    assert "--no-deps" in next(line for line in cpu.splitlines() if "--group sglang" in line)


def test_without_a_word_the_driver_chooses_the_lock(tmp_path):
    assert f"--constraint {GPU if DRIVER.exists() else CPU} " in would(tmp_path / "new", "setup").stdout


@pytest.mark.parametrize(("lock", "other"), [(CPU, GPU), (GPU, CPU)])
def test_an_environment_keeps_its_lock_until_another_is_named(tmp_path, lock, other):
    environment = made(tmp_path, lock)
    assert "pip install" not in would(environment, "setup").stdout
    assert "pip install" not in would(environment, "setup", f"LOCK={lock}").stdout
    anew = would(environment, "setup", f"LOCK={other}").stdout
    assert f"-m venv --clear {environment}" in anew
    assert anew.count(f"--constraint {other} ") == 2


def test_the_lock_is_no_override(tmp_path):
    done = would(made(tmp_path, GPU), "data", f"LOCK={GPU}", "optim.lr=1")
    assert "optim.lr=1" in done.stdout
    assert "LOCK" not in done.stdout


def test_a_lock_that_is_none_of_the_environments_is_refused(tmp_path):
    done = would(tmp_path, "setup", "LOCK=constraints-slime.txt")
    assert done.returncode == 2
    assert "write LOCK=constraints.txt, or LOCK=constraints-gpu.txt" in done.stderr
