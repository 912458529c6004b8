"""The Ray cluster or local Ray instance that this process uses."""

import contextlib
import functools
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import ray
from ray._private import services

from launch.cluster import ray_errors
from launch.cluster.processes import end
from recipes.config import Recipe
from recipes.errors import PreflightError
from recipes.paths import in_ray_job

TRIES = 3  # attempts to start Ray when a start times out, e.g. on a busy machine
_SOCKET_BYTES = 107  # the operating system's limit for the path of a Unix socket
_SOCKET = "session_2000-01-01_00-00-00_000000_{}/sockets/plasma_store"  # the longest socket path in Ray's folder; {}: process id
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - only a randomly named link is created there
_SESSION_BYTES = 64 << 20  # disk space of a Ray session; with less, Ray waits for its processes until a timeout


@contextlib.contextmanager
def connected(num_cpus: int | None = None, num_gpus: int | None = None) -> Iterator[None]:
    """Connect to Ray for the block: to the job's cluster inside a Ray job, otherwise to a Ray started on this machine.

    A Ray started here ends with the block. num_cpus, num_gpus: its resources; None takes all that the machine has.
    Raise `PreflightError` if Ray cannot be reached or started.
    """
    if not in_ray_job():
        for name, value in own_ray().items():
            os.environ.setdefault(name, value)
    here = {
        "num_cpus": num_cpus,
        "num_gpus": num_gpus,
        "object_store_memory": 100 << 20,  # enough for small messages: data and weights are read from files
    }
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with session(here, logging_level=logging.ERROR, log_to_driver=True):
        # ray.init installs a handler that would end this process without cleanup.
        signal.signal(signal.SIGTERM, on_sigterm)
        yield


@contextlib.contextmanager
def session(here: dict[str, Any], **options: Any) -> Iterator[None]:
    """Connect as `connected` does, with these options of `ray.init`. here: extra options for a Ray that is started here."""
    if in_ray_job():
        with _started(**options):
            yield
        return
    _check_port()
    with _folder() as folder, _started(address="local", include_dashboard=False, _temp_dir=folder, **here, **options):
        yield


def own_ray() -> dict[str, str]:
    """Return environment variables for a Ray that is started here. Variables that are already set take precedence."""
    return {
        # A private token, which Ray reads once. Without it Ray writes a token to the home folder, and clusters started
        # there later demand it from their users.
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # How long Ray's processes outlive a killed driver, and a driver outlives its killed Ray.
        "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
        # Ray's defaults (30, 60 and 100 s) are too short for a start on a busy machine.
        "RAY_gcs_server_port_wait_time_s": "120",
        "RAY_worker_register_timeout_seconds": "300",
        "RAY_agent_register_timeout_ms": "300000",
    }


def sockets(recipe: Recipe) -> dict[str, str]:
    """Return the environment variables that make NCCL and Gloo use `cluster.interface`; empty if it is not set."""
    chosen = recipe.cluster.interface
    return {"NCCL_SOCKET_IFNAME": chosen, "GLOO_SOCKET_IFNAME": chosen} if chosen else {}


def _check_port() -> None:
    """Raise `PreflightError` if RAY_GCS_SERVER_PORT is no free port: Ray would end this process."""
    wanted = os.environ.get("RAY_GCS_SERVER_PORT", "")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(wanted or 0)))
        except (OSError, ValueError, OverflowError) as error:
            raise PreflightError(
                f"RAY_GCS_SERVER_PORT={wanted} cannot be used: {getattr(error, 'strerror', None) or 'it is not a port'}",
                "unset it, and Ray takes a free port",
            ) from error


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """Yield the path of Ray's folder, inside RAY_TMPDIR or TMPDIR.

    If its socket paths would be too long (common in Slurm jobs), yield a short link to it, which is removed at the end.
    Raise `PreflightError` if no link can be created, or if the folder has no space.
    """
    folder = str(ray_errors.folder())
    with ray_errors.named():
        os.makedirs(folder, exist_ok=True)
        free = shutil.disk_usage(folder).free
    if free < _SESSION_BYTES:
        raise PreflightError(
            f"'{folder}' has {free / 1e6:.0f} MB free, but Ray needs {_SESSION_BYTES / 1e6:.0f} MB",
            "make room there, or set RAY_TMPDIR=FOLDER on another disk, before the command",
        )
    if (length := _longest(folder)) <= _SOCKET_BYTES:
        yield folder
        return
    for short in _SHORT:
        link = os.path.join(short, f"limi-{secrets.token_hex(4)}")
        with contextlib.suppress(OSError):
            os.symlink(folder, link)
            break
    else:
        most = len(os.fsencode(folder)) - len("/ray") - (length - _SOCKET_BYTES)
        raise PreflightError(
            f"with the folder of RAY_TMPDIR or TMPDIR, '{os.path.dirname(folder)}', a socket path has {length} bytes; the "
            f"limit is {_SOCKET_BYTES}, and no link to the folder can be created in {', '.join(_SHORT)}",
            f"set RAY_TMPDIR=FOLDER before the command, with a path of at most {most} bytes",
        )
    try:
        yield link
    finally:
        os.unlink(link)


def _longest(folder: str) -> int:
    """Return the length of the longest socket path in Ray's folder, in bytes."""
    return len(os.fsencode(os.path.join(folder, _SOCKET.format(os.getpid()))))


@contextlib.contextmanager
def _started(**options: Any) -> Iterator[None]:
    """Run `ray.init` with these options, and shut Ray down after the block. Try `TRIES` times if a start times out."""
    try:
        began = time.monotonic()
        for number in range(1, TRIES + 1):
            try:
                _init(options)
                break
            except PreflightError as error:
                if not _timed_out(error):
                    raise
                if number == TRIES:
                    took = time.monotonic() - began
                    raise PreflightError(
                        f"{error.problem} ({TRIES} times in {took:.0f} s)",
                        f"stop other programs on this machine, or {error.fix}",
                    ) from error
                print(f"{error.problem}: retrying, attempt {number + 1} of {TRIES}", file=sys.stderr)
        yield
    finally:
        ray.shutdown()


def _init(options: dict[str, Any]) -> None:
    """Run `ray.init`. On failure end every process that it started, and raise `PreflightError`."""
    before = set(psutil.Process().children(recursive=True))
    try:
        with ray_errors.named(), _own_process_groups():
            ray.init(**options)
    except PreflightError:
        ray.shutdown()
        end(set(psutil.Process().children(recursive=True)) - before, patience=0)
        raise


@contextlib.contextmanager
def _own_process_groups() -> Iterator[None]:
    """Start Ray's processes outside this process's group.

    `timeout`, `make`, and a closed terminal send SIGTERM or SIGHUP to the whole group. Inside it, Ray would end before the current
    step is saved.
    """
    popen = services.ConsolePopen
    services.ConsolePopen = functools.partial(popen, process_group=0)  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        services.ConsolePopen = popen  # type: ignore[misc]


def _timed_out(error: PreflightError) -> bool:
    return re.search(r"timed ?out", error.problem, re.I) is not None
