"""Questions to a server that speaks SGLang's protocol, each given up once nothing comes of the server for too long."""

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

AT_ONCE = 16  # questions in flight

# A socket that is shut down under its reader, and an answer that is cut short, raise these.
_BROKEN = (OSError, HTTPException, ValueError)
_SHOWN = 500  # characters of an answer in a message
_PATIENCE_S = 2.0  # within which a process has ended whose connections broke
_READ = 1 << 16  # bytes of an answer at a time


def all_at_once(ask: Callable[[Asked], Answered], asked: Sequence[Asked]) -> list[Answered]:
    """Ask `AT_ONCE` questions at a time; return the answers in order. An error or a signal waits for no other answer."""
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        return list(pool.map(ask, asked))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class Client:
    """A server at `url`, http://HOST:PORT. A question is given up once nothing has come of any for `timeout` seconds, however long
    its whole answer takes. Follows no redirection and uses no proxy: nothing is asked but that server. Every method raises
    `SanityError` where it does not answer as it should; a status other than 200 is its `__cause__`, an `HTTPError`.

    again: the command that asks anew.
    """

    own = False  # whether the server was started here; the weights of another's are not ours to swap

    def __init__(self, url: str, timeout: float, again: str = "make sanity") -> None:
        self.url, self.timeout, self.again = url.rstrip("/"), timeout, again
        self._silence = Silence(self._signs)

    def get(self, path: str) -> Any:
        return self._json(path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return self._json(path, body)

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of an answer that comes as events."""
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
        """Whether it answers /health with status 200."""
        with suppress(SanityError), self._asked("/health", None) as answer:
            answer.read()
            return True
        return False

    def about(self, patience: float) -> str:
        """What is known of the server beside its answers, for the end of a message. patience: seconds to wait for its end."""
        return ""

    def _signs(self) -> object:
        """Figures of the server's work on what was asked, where there are any beside its answers."""
        return None

    def _json(self, path: str, body: dict[str, Any] | None) -> Any:
        with self._asked(path, body) as answer:
            return self._parsed(path, self._read(answer))

    def _read(self, answer: HTTPResponse) -> bytes:
        """Space that only keeps a connection open is no move."""
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
            raise SanityError(f"SGLang's answer to {path} is no JSON: {shown!r}{self.about(0)}") from error

    @contextmanager
    def _asked(self, path: str, body: dict[str, Any] | None) -> Iterator[HTTPResponse]:
        """The answer, of status 200; its body is read inside."""
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
                    f"SGLang at {self.url} did not answer {path}: nothing came of it for sanity.timeout={self.timeout:g} s",
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
        """Wakes whoever reads from the socket once all is silent, and sets the event."""
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
