"""HTTP client for a server that speaks SGLang's protocol. A request is given up if the server shows no sign of work for too long."""

import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.parse import urlsplit

from launch.serving.silence import Silence
from recipes.errors import SanityError

Asked = TypeVar("Asked")
Answered = TypeVar("Answered")

AT_ONCE = 16  # requests in flight

# Raised when a socket is shut down under its reader, or an answer is cut short.
_BROKEN = (OSError, HTTPException, ValueError)
_SHOWN = 500  # characters of an answer that a message quotes
_PATIENCE_S = 2.0  # longest wait for the end of a server process whose connection broke
_READ = 1 << 16  # bytes of an answer per read


def all_at_once(ask: Callable[[Asked], Answered], asked: Sequence[Asked]) -> list[Answered]:
    """Call `ask` on every item, `AT_ONCE` at a time, and return the results in order.

    An error or a signal ends the call at once, without waiting for the other requests.
    """
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        return list(pool.map(ask, asked))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class Client:
    """Client of the server at `url`, http://HOST:PORT.

    A request is given up once the server has shown no sign of work on any request for `timeout` seconds. The total time of an
    answer is not limited. Redirects and proxies are not used, so that only this server is contacted. Every method raises
    `SanityError` if the answer is wrong or missing; for a status other than 200 its `__cause__` is an `HTTPError`.

    again: the command to rerun, for error messages.
    """

    own = False  # whether the server was started here; only its own server's weights may be swapped

    def __init__(self, url: str, timeout: float, again: str = "make sanity") -> None:
        self.url, self.timeout, self.again = url.rstrip("/"), timeout, again
        self._silence = Silence(self._signs)

    def get(self, path: str) -> Any:
        return self._json(path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return self._json(path, body)

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the chunks of a streamed answer (server-sent events)."""
        with self._asked(path, body) as answer:
            for line in answer:
                if not line.startswith(b"data:"):
                    continue
                self._silence.broken()
                if (data := line[5:].strip()) == b"[DONE]":
                    return
                chunk = self._parsed(path, data)
                if "error" in chunk:
                    raise SanityError(f"SGLang broke off its answer to {path}: {str(chunk['error'])[:_SHOWN]}")
                yield chunk
            raise ConnectionError("the stream ended without its [DONE]")

    def healthy(self) -> bool:
        """Return whether the server answers /health with status 200."""
        with suppress(SanityError), self._asked("/health", None) as answer:
            answer.read()
            return True
        return False

    def about(self, patience: float) -> str:
        """Return what else is known of the server, to append to a message. patience: seconds to wait for the server's end."""
        return ""

    def _signs(self) -> object:
        """Return figures that change while the server works on requests; None if there are none besides its answers."""
        return None

    def _json(self, path: str, body: dict[str, Any] | None) -> Any:
        with self._asked(path, body) as answer:
            return self._parsed(path, self._read(answer))

    def _read(self, answer: HTTPResponse) -> bytes:
        """Read the whole body. White space that only keeps the connection open is no sign of work."""
        parts = []
        while part := answer.read1(_READ):
            parts.append(part)
            if part.strip():
                self._silence.broken()
        if answer.length:
            raise IncompleteRead(b"".join(parts), answer.length)
        return b"".join(parts)

    def _parsed(self, path: str, data: bytes) -> Any:
        try:
            return json.loads(data)
        except ValueError as error:
            shown = data.decode(errors="replace")[:_SHOWN]
            raise SanityError(f"SGLang's answer to {path} is not JSON: {shown!r}{self.about(0)}") from error

    @contextmanager
    def _asked(self, path: str, body: dict[str, Any] | None) -> Iterator[HTTPResponse]:
        """Send a request and yield its answer, whose status is 200. Errors while its body is read in the block are named too."""
        address = urlsplit(self.url)
        kind = HTTPSConnection if address.scheme == "https" else HTTPConnection
        connection = kind(address.hostname or "", address.port, timeout=self.timeout)
        method, data = ("GET", None) if body is None else ("POST", json.dumps(body))
        given_up = threading.Event()
        try:
            connection.connect()
            connection.sock.settimeout(None)
            with self._given_up(connection.sock, given_up):
                connection.request(method, path, data, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                if answer.status != 200:
                    raise self._refused(path, answer)
                yield answer
        except (SanityError, *_BROKEN) as error:
            if isinstance(error, TimeoutError) or given_up.is_set():
                raise SanityError(
                    f"SGLang at {self.url} did not answer {path}: no sign of work for sanity.timeout={self.timeout:g} s",
                    f"on a slow machine write `{self.again} sanity.timeout={2 * self.timeout:g}`{self.about(0)}",
                ) from error
            if isinstance(error, SanityError):
                raise
            raise SanityError(
                f"SGLang at {self.url} did not answer {path}: {error}{self.about(_PATIENCE_S)}"
            ) from error
        finally:
            connection.close()

    @contextmanager
    def _given_up(self, sock: socket.socket, given_up: threading.Event) -> Iterator[None]:
        """Watch the silence during the block. After `timeout` seconds set the event and shut the socket, which wakes its reader."""
        done, begun = threading.Event(), time.monotonic()

        def watch() -> None:
            while not done.wait(min(1.0, self.timeout / 4)):
                if min(self._silence.seconds(), time.monotonic() - begun) >= self.timeout:
                    given_up.set()
                    with suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)
                    return

        threading.Thread(target=watch, daemon=True).start()
        try:
            yield
        finally:
            done.set()

    def _refused(self, path: str, answer: HTTPResponse) -> SanityError:
        text = answer.read().decode(errors="replace")[:_SHOWN]
        error = SanityError(f"SGLang answered {answer.status} to {path}: {text}")
        error.__cause__ = HTTPError(self.url + path, answer.status, answer.reason, answer.headers, io.BytesIO())
        return error
