"""Plain messages, with a fix, for the errors of Ray's start and connection."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ray.exceptions import AuthenticationError

from recipes.compose import os_errors
from recipes.errors import PreflightError


@contextlib.contextmanager
def named() -> Iterator[None]:
    """Turn every error that `ray.init` raises in the block into a `PreflightError`."""
    try:
        yield
    except AuthenticationError as error:
        raise PreflightError(
            f"the cluster asks for a token: {_line(error)}",
            "copy ~/.ray/auth_token from the machine that started Ray, or set RAY_AUTH_TOKEN_PATH to a file with it",
        ) from error
    except OSError as error:
        if not error.errno:
            raise _by_text(error) from error
        found = os_errors.named(error, None)
        raise PreflightError(
            found.problem, found.fix or "set RAY_TMPDIR=FOLDER you can write to, before the command"
        ) from error
    except Exception as error:  # Ray raises plain Exception
        raise _by_text(error) from error


def folder() -> Path:
    """Return the folder in which a Ray that this command starts keeps its session files."""
    return Path(os.path.abspath(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"), "ray")  # noqa: S108


def logs() -> Path:
    """Return the log folder of the latest Ray that this process started; if it started none, of the machine's latest."""
    return max(folder().glob(f"session_*_{os.getpid()}"), default=folder() / "session_latest") / "logs"


def _by_text(error: Exception) -> PreflightError:
    """Return the message for an error that only its text identifies: Ray has no exception types for these."""
    text = _line(error)
    if found := re.search(r"Version mismatch.*?Ray: (\S+) Python: (\S+).*?Ray: (\S+) Python: (\S+)", text):
        return PreflightError(
            "the cluster runs Ray {} with Python {}, but this process runs Ray {} with Python {}".format(
                *found.groups()
            ),
            "start Ray on every node from the environment of the job's python3: put that environment first on the PATH",
        )
    if found := re.search(r"Failed to connect to Ray cluster at (\S+)|Could not find any running Ray instance", text):
        return PreflightError(
            f"no Ray answers{f' at {found[1]}' if found[1] else ''}",
            "check that it runs (`ray status` on the head), start it if it does not, and submit the job once more",
        )
    if "exceeds /dev/shm" in text:
        return PreflightError(text, "make room in /dev/shm; in Docker, use `docker run --shm-size=16g` or more")
    return PreflightError(f"Ray does not start: {text}", f"read its logs in {logs()}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
