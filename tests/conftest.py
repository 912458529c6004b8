"""Fixtures of all tests: the reference folder, if there is one, and a separate environment for Ray."""

import functools
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest

from tests.guard import pytest_configure  # noqa: F401

REPO = Path(__file__).resolve().parents[1]
# Tiny tensors: threads would wait for one another longer than they work. Before torch is imported, and for what tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# `nohup` ignores it, and commands that tests start would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def reference() -> Path:
    """Return the folder of official templates, tokenizers and configurations. Skip the test, by name, if there is none."""
    folder = os.environ.get("LIMI_REFERENCE")
    if not folder:
        pytest.skip("LIMI_REFERENCE is not set")
    return Path(folder)


@pytest.fixture(scope="session", autouse=True)
def composed_once() -> Iterator[None]:
    """Compose each recipe once: Hydra takes 70 ms, and the result depends on the overrides alone."""

    @functools.cache
    def once(name: str, overrides: tuple[str, ...]) -> Any:
        return hydra.compose(name, [*overrides])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recipes.compose.recipe.compose", lambda name, overrides: once(name, tuple(overrides)))
        yield


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a `cluster.root` that tests share, so that tiny models and packed data sets are made once."""
    return tmp_path_factory.mktemp("limi")


@pytest.fixture(scope="session", autouse=True)
def pool() -> Iterator[None]:
    """End the ranks that tests share."""
    yield
    if "tests.launch.support" in sys.modules:
        sys.modules["tests.launch.support"].POOL.close()


@pytest.fixture(scope="session")
def bases(root: Path) -> dict[str, Path]:
    """Return the folders of the tiny models' checkpoints before training."""
    from tests.launch.support import recipe_of

    return {name: Path(recipe_of(root, f"model={name}")[0].model.checkpoint) for name in ("qwen3-tiny", "glm4.5-tiny")}
