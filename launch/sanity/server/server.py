"""The server that is asked: a SGLang of our own, started on loopback, waited for and always ended; or one that is up already."""

import contextlib
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import psutil

from launch.processes import end, end_session, end_with_parent, in_session
from launch.sanity.server import serving
from launch.sanity.server.client import Client
from recipes.config import Recipe
from recipes.errors import PreflightError, SanityError

_HEALTH_S = 5.0  # for one answer to /health


def free_port(wanted: int | None) -> int:
    """`sanity.port`, or a free one. Raises `PreflightError` where it is in use."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted or 0))
        except OSError as error:
            raise PreflightError(
                f"sanity.port={wanted} cannot be had: {error.strerror}", "write sanity.port=null for a free one"
            ) from error
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(recipe: Recipe, checkpoint: Path, log: Path, thinks: bool) -> Iterator[Client]:
    """A server of the checkpoint: that at `sanity.url`, or one of our own that writes `log` and is gone after the block.
    `Client.own` says which.

    Raises `PreflightError` where nothing answers at `sanity.url`, and as `Server`.
    """
    if recipe.sanity.url is None:
        with Server(recipe, checkpoint, log, thinks) as server:
            yield server
        return
    if not Client(recipe.sanity.url, _HEALTH_S).healthy():
        raise PreflightError(
            f"sanity.url={recipe.sanity.url} does not answer /health with 200 within {_HEALTH_S:g} s",
            "wait until it is up, or write sanity.url=null, which starts one",
        )
    yield Client(recipe.sanity.url, recipe.sanity.timeout)


class Server(Client):
    """`with Server(recipe, checkpoint, log, thinks) as server:` answers requests inside the block; its processes are gone
    after it. Raises `PreflightError` where this machine cannot serve the model, and `SanityError` with the log's tail where the
    server does not come up or ends early."""

    own = True

    def __init__(self, recipe: Recipe, checkpoint: Path, log: Path, thinks: bool) -> None:
        serving.check_machine(recipe, checkpoint)
        self.recipe, self.checkpoint, self.log, self.thinks = recipe, checkpoint, log, thinks
        self.port = free_port(recipe.sanity.port)
        super().__init__(f"http://127.0.0.1:{self.port}", recipe.sanity.timeout)
        self._process: subprocess.Popen[bytes] | None = None
        self._log_file: IO[bytes] | None = None

    def __enter__(self) -> "Server":
        words = serving.command(self.recipe, self.checkpoint, self.port, self.thinks)
        env = serving.environment(self.recipe, self.checkpoint)
        self._log_file = self.log.open("wb")
        try:
            self._start(words, env)
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self, words: list[str], env: dict[str, str]) -> None:
        try:
            self._process = subprocess.Popen(
                words,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=self._log_file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent,  # noqa: PLW1509 - the driver runs no thread that holds a lock here
            )
        except OSError as error:
            raise PreflightError(
                f"SGLang cannot be started: {error}", "write engine.python=PYTHON that has it"
            ) from error

    def _wait(self) -> None:
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            if (ended := self._ended(0)) is not None:
                raise SanityError(f"{ended}", f"the end of {self.log}:\n{self.tail()}")
            if Client(self.url, min(_HEALTH_S, max(0.1, deadline - time.monotonic()))).healthy():
                self._refuse_stranger()
                return
            time.sleep(0.2)
        raise SanityError(
            f"SGLang did not come up within sanity.timeout={self.timeout:g} s",
            f"raise it, or read {self.log}:\n{self.tail()}",
        )

    def _refuse_stranger(self) -> None:
        """Another process can take a port that was free, and answer in the place of ours."""
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                if any(
                    c.status == psutil.CONN_LISTEN and c.laddr.port == self.port for c in process.net_connections("tcp")
                ):
                    return
        raise SanityError(
            f"port {self.port} is another process's, which was not started here and is left alone",
            "run the same command again, or write sanity.port=N of a free one",
        )

    def _processes(self) -> list[psutil.Process]:
        """All of the server, children that left their parent or its process group too."""
        if self._process is None:
            return []
        found = set(in_session(self._process.pid))
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= set(psutil.Process(self._process.pid).children(recursive=True))
        return list(found)

    def _ended(self, patience: float | None) -> str | None:
        """What to say of a server that has ended, or does within so many seconds; null waits as long as it takes."""
        if self._process is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            return f"SGLang ended with status {self._process.wait(patience)}"
        return None

    def about(self, patience: float) -> str:
        ended = self._ended(patience)
        return f"; {ended + '; ' if ended else ''}the end of {self.log}:\n{self.tail()}"

    def tail(self, lines: int = 20) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def wait(self) -> None:
        """Returns never: raises `SanityError` when the server ends by itself."""
        raise SanityError(f"{self._ended(None)}", f"the end of {self.log}:\n{self.tail()}")

    def stop(self) -> None:
        """Ends all processes of the server: SIGTERM, two seconds, SIGKILL. A second Ctrl-C does not cut it short."""
        with _undisturbed():
            if self._process is not None:
                left = self._processes()
                end_session(self._process, patience=2.0)
                end({*left, *self._processes()}, patience=0)
                self._process = None
            if self._log_file is not None:
                self._log_file.close()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Without SIGINT and SIGTERM, where this is the thread that gets them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {sign: signal.signal(sign, signal.SIG_IGN) for sign in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)
