"""A SGLang server of our own: started on loopback, waited for, asked, and always ended."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, Any

from launch.processes import end_session, end_with_parent
from recipes.config import Family, Recipe
from recipes.errors import PreflightError, SanityError

STAND_INS = Path(__file__).parent / "stand_ins"
PARSERS = {Family.qwen3: ("qwen25", "qwen3"), Family.glm4_moe: ("glm45", "glm45")}  # tool calls, reasoning
_MAX_TOTAL_TOKENS = 65_536  # of the key-value cache on a CPU, all requests together


def free_port(wanted: int | None) -> int:
    """`sanity.port`, or a free one. Raises `PreflightError` where it is in use."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted or 0))
        except OSError as error:
            raise PreflightError(
                f"sanity.port={wanted} cannot be had: {error.strerror}; write sanity.port=null for a free one"
            ) from error
        return int(probe.getsockname()[1])


def command(recipe: Recipe, checkpoint: Path, port: int) -> list[str]:
    """SGLang's command line for this model on a CPU, in fp32 whatever it trained in: bf16 is emulated on most of them."""
    calls, reasoning = PARSERS[recipe.model.family]
    return [
        sys.executable, "-m", "sglang.launch_server", "--model-path", str(checkpoint), "--host", "127.0.0.1",
        "--port", str(port), "--device", "cpu", "--dtype", "float32", "--tool-call-parser", calls,
        "--reasoning-parser", reasoning, "--max-total-tokens", str(_MAX_TOTAL_TOKENS), "--max-running-requests", "16",
        "--skip-server-warmup", "--log-level", "warning",
    ]  # fmt: skip


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "SGLANG_USE_CPU_ENGINE": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(STAND_INS),
        "PYTHONWARNINGS": "ignore",
    }


class Server:
    """`with Server(recipe, checkpoint, log) as server:` answers requests inside the block; its processes are gone
    after it. Raises `SanityError` with the log's tail where the server does not come up or ends early."""

    def __init__(self, recipe: Recipe, checkpoint: Path, log: Path) -> None:
        self.recipe, self.checkpoint, self.log = recipe, checkpoint, log
        self.port = free_port(recipe.sanity.port)
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        self._log_file: IO[bytes] | None = None

    def __enter__(self) -> "Server":
        self._log_file = self.log.open("wb")
        self._process = subprocess.Popen(
            command(self.recipe, self.checkpoint, self.port),
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=self._log_file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=end_with_parent,  # noqa: PLW1509 - the driver runs no thread that holds a lock here
        )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait(self) -> None:
        deadline = time.monotonic() + self.recipe.sanity.timeout
        while time.monotonic() < deadline:
            self._check_alive()
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
            time.sleep(0.2)
        raise SanityError(
            f"SGLang did not answer within sanity.timeout={self.recipe.sanity.timeout} s; raise it, or read {self.log}:\n"
            f"{self.tail()}"
        )

    def _check_alive(self) -> None:
        assert self._process is not None
        if (code := self._process.poll()) is not None:
            raise SanityError(f"SGLang ended with status {code}; the end of {self.log}:\n{self.tail()}")

    def tail(self, lines: int = 20) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def get(self, path: str) -> Any:
        return self._ask(urllib.request.Request(self.url + path))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        return self._ask(urllib.request.Request(self.url + path, json.dumps(body).encode(), headers))

    def _ask(self, request: urllib.request.Request) -> Any:
        try:
            with urllib.request.urlopen(request, timeout=self.recipe.sanity.timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")[:500]
            raise SanityError(f"SGLang answered {error.code} to {request.selector}: {text}") from error
        except TimeoutError as error:
            raise SanityError(
                f"SGLang did not answer {request.selector} within sanity.timeout={self.recipe.sanity.timeout} s; write "
                f"sanity.timeout={2 * self.recipe.sanity.timeout}, or read {self.log}"
            ) from error
        except (OSError, json.JSONDecodeError) as error:
            self._check_alive()
            raise SanityError(
                f"SGLang did not answer {request.selector}: {error}; the end of {self.log}:\n{self.tail()}"
            ) from error

    def stop(self) -> None:
        """Ends the server's own session of processes: SIGTERM, two seconds, SIGKILL."""
        if self._process is not None:
            end_session(self._process, patience=2.0)
            self._process = None
        if self._log_file is not None:
            self._log_file.close()
