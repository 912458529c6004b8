"""The server to query: an SGLang started here on loopback, awaited and always ended; or one that already runs at `sanity.url`."""

import contextlib
import json
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import IO

import psutil

from data_prep.workers import undisturbed
from launch.cluster.processes import end, end_session, end_with_parent, in_session
from launch.serving import sglang_command
from launch.serving.client import Client
from launch.serving.silence import Silence
from recipes.compose import commands
from recipes.config import Recipe
from recipes.errors import PreflightError, SanityError

_HEALTH_S = 20.0  # SGLang's own limit, after which it reports that it is not healthy
_LOADS = "/v1/loads"
_BUSY = 0.02  # CPU time, as a share of the timeout, that counts as work; an idle process uses less


def free_port(wanted: int | None) -> int:
    """Return the wanted port (`sanity.port`), or any free port for None. Raise `PreflightError` if it is in use."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted or 0))
        except OSError as error:
            raise PreflightError(
                f"sanity.port={wanted} cannot be used: {error.strerror}", "write sanity.port=null for a free port"
            ) from error
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(recipe: Recipe, checkpoint: Path, log: Path, thinks: bool) -> Iterator[Client]:
    """Yield a client of the checkpoint's server: the one at `sanity.url`, or one started here that ends with the block.

    A server started here writes to `log`. `Client.own` says which of the two it is. thinks: whether the model was trained with
    thinking. Raise `PreflightError` if `sanity.url` is not healthy, and the errors of `Server`.
    """
    if recipe.sanity.url is None:
        with Server(recipe, checkpoint, log, thinks) as server:
            yield server
        return
    client = Client(recipe.sanity.url, recipe.sanity.timeout, again("sanity", recipe, checkpoint))
    if not client.healthy():
        raise PreflightError(
            f"sanity.url={recipe.sanity.url} does not answer /health with 200",
            "wait until it is up, or write sanity.url=null to start a server here",
        )
    yield client


def again(stage: str, recipe: Recipe, checkpoint: Path) -> str:
    """Return the command that runs only this stage (`sanity` or `serve`) on the checkpoint, without training.

    More overrides can be appended to it.
    """
    if not (checkpoint.parent / "config.yaml").is_file():
        return shlex.join(["make", stage, *(w for w in recipe.overrides if not w.startswith("sanity.timeout="))])
    if checkpoint.name == "hf":
        return commands.of_run(stage, recipe)
    return commands.of_place(stage, recipe, f"checkpoint={checkpoint}")


class Server(Client):
    """An SGLang server that runs for a block: `with Server(recipe, checkpoint, log, thinks) as server:`.

    All its processes are gone after the block. stage: the stage that messages say to rerun. Raise `PreflightError` if this
    machine cannot serve the model, and `SanityError` with the log's tail if the server does not come up or ends early.
    """

    own = True

    def __init__(self, recipe: Recipe, checkpoint: Path, log: Path, thinks: bool, stage: str = "sanity") -> None:
        sglang_command.check_machine(recipe, checkpoint)
        self.recipe, self.checkpoint, self.log, self.thinks = recipe, checkpoint, log, thinks
        self.port = free_port(recipe.sanity.port)
        super().__init__(f"http://127.0.0.1:{self.port}", recipe.sanity.timeout, again(stage, recipe, checkpoint))
        self._process: subprocess.Popen[bytes] | None = None
        self._log_file: IO[bytes] | None = None

    def __enter__(self) -> "Server":
        words = sglang_command.command(self.recipe, self.checkpoint, self.port, self.thinks)
        env = sglang_command.environment(self.recipe, self.checkpoint)
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
                preexec_fn=end_with_parent,  # noqa: PLW1509 - no thread of the driver holds a lock here
            )
        except OSError as error:
            raise PreflightError(
                f"SGLang cannot be started: {error}", "write engine.python=PYTHON of an environment that has SGLang"
            ) from error

    def _wait(self) -> None:
        silence = Silence(self._starting)
        while silence.seconds() < self.timeout:
            if (ended := self._ended(0)) is not None:
                raise SanityError(f"{ended}", f"the end of {self.log}:\n{self.tail()}")
            if Client(self.url, min(_HEALTH_S, self.timeout)).healthy():
                self._refuse_stranger()
                return
            time.sleep(0.2)
        raise SanityError(
            f"SGLang did not come up: no sign of work and no log output for sanity.timeout={self.timeout:g} s",
            f"on a slow machine write `{self.again} sanity.timeout={2 * self.timeout:g}`{self.about(0)}",
        )

    def _starting(self) -> object:
        """Return figures that change as long as a starting server makes progress.

        They are: whether it listens, the size of its log, its CPU time in units of `_BUSY` x timeout, and the MB it read from disks.
        CPU time is left out once the server listens, because it then uses some even when idle.
        """
        with socket.socket() as probe:
            listens = probe.connect_ex(("127.0.0.1", self.port)) == 0
        seconds = 0.0
        for process in [] if listens else self._processes():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                seconds += times.user + times.system
        return listens, self.log.stat().st_size, seconds // (_BUSY * self.timeout), self._read_mb()

    def _signs(self) -> object:
        """Return figures that change while the server works: its counts of tokens and requests, and the MB it read from disks.

        They show progress of a long answer, a queue, or a load of weights. CPU time is left out: it grows even when idle.
        """
        figures: object = None
        with contextlib.suppress(OSError, HTTPException, ValueError, LookupError, TypeError):
            connection = HTTPConnection("127.0.0.1", self.port, timeout=min(_HEALTH_S, self.timeout))
            with contextlib.closing(connection):
                connection.request("GET", _LOADS)
                loads = json.loads(connection.getresponse().read())["loads"]
            figures = [{k: v for k, v in one.items() if k.startswith(("num_", "total_"))} for one in loads]
        return figures, self._read_mb()

    def _read_mb(self) -> int:
        total = 0
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                total += process.io_counters().read_bytes
        return total >> 20

    def _refuse_stranger(self) -> None:
        """Raise `SanityError` if another process listens on the port: it can take a free port before our server does."""
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                if any(
                    c.status == psutil.CONN_LISTEN and c.laddr.port == self.port for c in process.net_connections("tcp")
                ):
                    return
        raise SanityError(
            f"port {self.port} belongs to another process, which was not started here and is left alone",
            "rerun the same command, or write sanity.port=N with a free port",
        )

    def _processes(self) -> list[psutil.Process]:
        """Return all processes of the server, including children that left their parent or its process group."""
        if self._process is None:
            return []
        found = set(in_session(self._process.pid))
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= set(psutil.Process(self._process.pid).children(recursive=True))
        return list(found)

    def _ended(self, patience: float | None) -> str | None:
        """Return how the server ended, or None if it still runs after `patience` seconds. None waits without limit."""
        if self._process is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            return f"SGLang ended with status {self._process.wait(patience)}"
        return None

    def about(self, patience: float) -> str:
        ended = self._ended(patience)
        return f"; {ended + '; ' if ended else ''}the end of {self.log}:\n{self.tail()}"

    def tail(self, lines: int = 20) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def wait(self) -> None:
        """Wait until the server ends by itself, then raise `SanityError`. It never returns."""
        raise SanityError(f"{self._ended(None)}", f"the end of {self.log}:\n{self.tail()}")

    def stop(self) -> None:
        """End all processes of the server: SIGTERM, then SIGKILL after two seconds. Wait until they are gone.

        This can take a while on a busy machine; a second Ctrl-C does not interrupt it.
        """
        with undisturbed():
            if self._process is not None:
                left = self._processes()
                end_session(self._process, patience=2.0)
                left += self._processes()
                end(left, patience=0)
                deadline = time.monotonic() + self.timeout
                while any(map(_runs, left)) and time.monotonic() < deadline:
                    time.sleep(0.05)
                self._process = None
            if self._log_file is not None:
                self._log_file.close()


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
