"""The Ray actor that holds one rank. It starts fast, because it imports torch and Megatron only when it builds the rank."""

import gc
from pathlib import Path
from typing import Any

from data_prep.pack.dataset import Dataset, open_dataset
from launch.cluster.rendezvous import open_store
from launch.megatron.rank_place import Place
from recipes.config import Recipe
from recipes.schedule.schedule import Schedule

Source = tuple[str, Schedule]  # the folder of a data set, and its sequences in each step


class Worker:
    """The actor's class: builds a `Rank` and forwards calls to it."""

    def __init__(self) -> None:
        self._rank: Any = None
        self._store: Any = None

    def open_store(self, host: str) -> int:
        """Open the rendezvous store of all ranks on a free port of this node. Return the port."""
        self._store, port = open_store(host)
        return port

    def build(self, recipe: Recipe, place: Place, train: Source, heldout: Source | None) -> None:
        """Build the rank, in place of any earlier one. train, heldout: the training and the held-out data."""
        if self._rank is not None:
            self._rank.leave()
            self._rank = None
            gc.collect()  # a rank is part of reference cycles, which hold its GPU's memory
        from launch.megatron import cpu

        cpu.install()  # before the first import of megatron.core
        from launch.megatron.rank import Rank
        from launch.weights.safetensors_folder import SafetensorsFolder

        read = SafetensorsFolder(Path(recipe.model.checkpoint)).read
        self._rank = Rank(recipe, place, _opened(train), heldout and _opened(heldout), read)

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the rank and return its result."""
        return getattr(self._rank, method)(*arguments)


def _opened(source: Source) -> tuple[Dataset, Schedule]:
    return open_dataset(Path(source[0])), source[1]
