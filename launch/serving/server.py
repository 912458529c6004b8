"""The server that is asked: a SGLang of our own, started on loopback, waited for and always ended; or one that is up already."""

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

_HEALTH_S = 20.0  # SGLang's own, within which it says that it is not healthy
_LOADS = "/v1/loads"
_BUSY = 0.02  # of a limit in silence: who waits for nothing takes less of the processors


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
    client = Client(recipe.sanity.url, recipe.sanity.timeout, again("sanity", recipe, checkpoint))
    if not client.healthy():
        raise PreflightError(
            f"sanity.url={recipe.sanity.url} does not answer /health with 200",
            "wait until it is up, or write sanity.url=null, which starts one",
        )
    yield client


def again(stage: str, recipe: Recipe, checkpoint: Path) -> str:
    """Return the command of a stage alone, `sanity` or `serve`, on this checkpoint, to which more can be given; it trains nothing."""
    if not (checkpoint.parent / "config.yaml").is_file():
        return shlex.join(["make", stage, *(w for w in recipe.words if not w.startswith("sanity.timeout="))])
    if checkpoint.name == "hf":
        return commands.of_run(stage, recipe)
    return commands.of_place(stage, recipe, f"checkpoint={checkpoint}")


class Server(Client):
    """`with Server(recipe, checkpoint, log, thinks) as server:` answers requests inside the block; its processes are gone
    after it. stage: that a message says to run again. Raises `PreflightError` where this machine cannot serve the
    model, and `SanityError` with the log's tail where the server does not come up or ends early."""

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
                preexec_fn=end_with_parent,  # noqa: PLW1509 - the driver runs no thread that holds a lock here
            )
        except OSError as error:
            raise PreflightError(
                f"SGLang cannot be started: {error}", "write engine.python=PYTHON that has it"
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
            f"SGLang did not come up: it was at work on nothing, and wrote nothing, for sanity.timeout={self.timeout:g} s",
            f"on a slow machine write `{self.again} sanity.timeout={2 * self.timeout:g}`{self.about(0)}",
        )

    def _starting(self) -> object:
        """Its log's size, how often it took `_BUSY` of the limit of processors' time, the megabytes that it read from disks. Once it
        listens its processors are busy whether it works or not, and do not count."""
        with socket.socket() as probe:
            listens = probe.connect_ex(("127.0.0.1", self.port)) == 0
        seconds = 0.0
        for process in [] if listens else self._processes():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                seconds += times.user + times.system
        return listens, self.log.stat().st_size, seconds // (_BUSY * self.timeout), self._read_mb()

    def _signs(self) -> object:
        """How many tokens it holds and has read, how many requests it works on, and the megabytes that it read from disks: of an
        answer that is long, of a queue, and of weights. Its processors are busy even when it is not."""
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
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def wait(self) -> None:
        """Returns never: raises `SanityError` when the server ends by itself."""
        raise SanityError(f"{self._ended(None)}", f"the end of {self.log}:\n{self.tail()}")

    def stop(self) -> None:
        """Ends all processes of the server: SIGTERM, two seconds, SIGKILL; and waits until they are gone, which on a busy machine
        takes a while. A second Ctrl-C does not cut it short."""
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
