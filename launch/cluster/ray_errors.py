"""What Ray cannot start by, or connect to, in words that say what fixes it."""

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
    """Raises as `PreflightError` whatever `ray.init` raises."""
    try:
        yield
    except AuthenticationError as error:
        raise PreflightError(
            f"the cluster wants a token: {_line(error)}",
            "copy ~/.ray/auth_token of the machine that started Ray, or set RAY_AUTH_TOKEN_PATH to a file with it",
        ) from error
    except OSError as error:
        if not error.errno:
            raise _by_text(error) from error
        found = os_errors.named(error, None)
        raise PreflightError(
            found.problem, found.fix or "set RAY_TMPDIR=FOLDER you can write to, before the command"
        ) from error
    except Exception as error:  # Ray raises Exception itself
        raise _by_text(error) from error


def folder() -> Path:
    """Where a Ray that is started here keeps its files."""
    return Path(os.path.abspath(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"), "ray")  # noqa: S108


def logs() -> Path:
    """Where Ray writes what its processes say: the last one that this process started, or else the machine's last."""
    return max(folder().glob(f"session_*_{os.getpid()}"), default=folder() / "session_latest") / "logs"


def _by_text(error: Exception) -> PreflightError:
    """Ray has no types for these."""
    text = _line(error)
    if found := re.search(r"Version mismatch.*?Ray: (\S+) Python: (\S+).*?Ray: (\S+) Python: (\S+)", text):
        return PreflightError(
            "the cluster runs Ray {} with Python {}, and this process Ray {} with Python {}".format(*found.groups()),
            "start Ray on every node with the environment first on the PATH that the job's python3 is of",
        )
    if found := re.search(r"Failed to connect to Ray cluster at (\S+)|Could not find any running Ray instance", text):
        return PreflightError(
            f"no Ray answers{f' at {found[1]}' if found[1] else ''}",
            "look whether it runs (`ray status` on the head), start it where it does not, and submit the job anew",
        )
    if "exceeds /dev/shm" in text:
        return PreflightError(text, "make room in /dev/shm; in Docker, `docker run --shm-size=16g` or more")
    return PreflightError(f"Ray does not start: {text}", f"look at its logs in {logs()}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
