"""The Ray actor around one rank: cheap to start, it imports torch and Megatron when the rank is built."""

from typing import Any

from launch.store import open_store


class Worker:
    def __init__(self) -> None:
        self._rank: Any = None
        self._store: Any = None

    def open_store(self, host: str) -> int:
        """Opens, on a free port of this node, the store where all ranks meet; returns the port."""
        self._store, port = open_store(host)
        return port

    def build(self, *arguments: Any) -> None:
        if self._rank is not None:
            self._rank.leave()
        from launch.megatron import cpu

        cpu.install()  # before the first import of megatron.core
        from launch.megatron.rank import Rank

        self._rank = Rank(*arguments)

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._rank, method)(*arguments)
