"""The Ray actor around one rank: cheap to start, it imports torch and Megatron when the rank is built."""

from pathlib import Path
from typing import Any

from data_prep.pack.dataset import Dataset, open_dataset
from launch.cluster.rendezvous import open_store
from launch.megatron.rank_place import Place
from recipes.config import Recipe
from recipes.schedule.schedule import Schedule

Source = tuple[str, Schedule]  # folder of a data set, and what comes of it in each step


class Worker:
    def __init__(self) -> None:
        self._rank: Any = None
        self._store: Any = None

    def open_store(self, host: str) -> int:
        """Opens, on a free port of this node, the store where all ranks meet; returns the port."""
        self._store, port = open_store(host)
        return port

    def build(self, recipe: Recipe, place: Place, train: Source, heldout: Source | None) -> None:
        if self._rank is not None:
            self._rank.leave()
        from launch.megatron import cpu

        cpu.install()  # before the first import of megatron.core
        from launch.megatron.rank import Rank
        from launch.weights.safetensors_folder import SafetensorsFolder

        read = SafetensorsFolder(Path(recipe.model.checkpoint)).read
        self._rank = Rank(recipe, place, _opened(train), heldout and _opened(heldout), read)

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._rank, method)(*arguments)


def _opened(source: Source) -> tuple[Dataset, Schedule]:
    return open_dataset(Path(source[0])), source[1]
