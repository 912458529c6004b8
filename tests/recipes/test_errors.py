"""Errors cross processes: workers of `make data`, Ray's actors."""

import importlib
import pkgutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

import data_prep
import launch
import recipes
from data_prep.trajectory import Code, Rejected
from launch.megatron import cpu
from recipes.errors import LimiError

# Modules that only run inside an engine's own process, where its packages are.
ELSEWHERE = ("launch.megatron.rank", "launch.serving.stand_ins", "launch.limi", "launch.slime.hooks.driver")


def classes(kind: type[LimiError] = LimiError) -> Iterator[type[LimiError]]:
    yield kind
    for narrower in kind.__subclasses__():
        yield from classes(narrower)


def every_class() -> list[type[LimiError]]:
    cpu.install()  # before the first import of Megatron
    for package in (recipes, data_prep, launch):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.startswith(ELSEWHERE):
                importlib.import_module(module.name)
    return sorted(set(classes()), key=lambda kind: kind.__name__)


def an_error(kind: type[LimiError]) -> LimiError:
    return Rejected(Code.json, "9 is over 5", "write 5", "a") if kind is Rejected else kind("9 is over 5", "write 5")


def raised(kind: type[LimiError]) -> None:
    raise an_error(kind)


@pytest.fixture(scope="module")
def other_process() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1) as pool:
        yield pool


def test_every_error_is_the_same_in_another_process(other_process):
    found = every_class()
    assert Rejected in found and len(found) >= 9
    for kind in found:
        with pytest.raises(kind) as caught:
            other_process.submit(raised, kind).result()
        assert type(caught.value) is kind
        assert vars(caught.value) == vars(an_error(kind)), kind
        assert str(caught.value) == "9 is over 5; write 5"


def test_an_error_without_a_fix_ends_with_its_problem():
    assert str(LimiError("no tokenizer")) == "no tokenizer"
