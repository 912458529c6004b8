"""The Ray that this process works with."""

import contextlib
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

from launch.cluster import ray_errors
from launch.cluster.processes import end
from recipes.config import Recipe
from recipes.errors import PreflightError
from recipes.paths import in_ray_job

TRIES = 3  # of a start that takes too long, as on a busy machine
_SOCKET_BYTES = 107  # the longest path of a socket
_SOCKET = "session_2000-01-01_00-00-00_000000_{}/sockets/plasma_store"  # the longest in Ray's folder, by process id
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - a link of the run's own is made there
_ROOM = 64 << 20  # bytes that a session takes: without them Ray waits for its processes until a time-out


@contextlib.contextmanager
def connected(num_cpus: int | None = None, num_gpus: int | None = None) -> Iterator[None]:
    """In a Ray job its cluster, otherwise a Ray of this machine, with what the machine has where these are None; a Ray that was
    started here ends on leaving. Raises `PreflightError` where there is none."""
    if not in_ray_job():
        for name, value in own_ray().items():
            os.environ.setdefault(name, value)
    here = {
        "num_cpus": num_cpus,
        "num_gpus": num_gpus,
        "object_store_memory": 100 << 20,  # only small messages pass: data and weights are read from files
    }
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with session(here, logging_level=logging.ERROR, log_to_driver=True):
        # Ray's own handler, set by ray.init, would end this process without the cleanup.
        signal.signal(signal.SIGTERM, on_sigterm)
        yield


@contextlib.contextmanager
def session(here: dict[str, Any], **options: Any) -> Iterator[None]:
    """As `connected`, with these options of `ray.init`. here: those of a Ray that is started here."""
    if in_ray_job():
        with _started(**options):
            yield
        return
    _check_port()
    with _folder() as folder, _started(address="local", include_dashboard=False, _temp_dir=folder, **here, **options):
        yield


def own_ray() -> dict[str, str]:
    """What a Ray that is started here gets in its environment, where that has not said otherwise."""
    return {
        # A token of this process's own, which Ray reads once: else it writes one to the home folder, and clusters
        # started there later ask their users for it.
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Ray's processes of a killed driver, and a driver whose Ray was killed, wait so long before they end.
        "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
        # Ray's own, 30, 60 and 100 s, end a start on a busy machine.
        "RAY_gcs_server_port_wait_time_s": "120",
        "RAY_worker_register_timeout_seconds": "300",
        "RAY_agent_register_timeout_ms": "300000",
    }


def sockets(recipe: Recipe) -> dict[str, str]:
    """The environment by which NCCL and Gloo take `cluster.interface`."""
    chosen = recipe.cluster.interface
    return {"NCCL_SOCKET_IFNAME": chosen, "GLOO_SOCKET_IFNAME": chosen} if chosen else {}


def _check_port() -> None:
    """Raises `PreflightError` where the port that the environment wants for Ray's server is in use: Ray would end this process."""
    wanted = os.environ.get("RAY_GCS_SERVER_PORT", "")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(wanted or 0)))
        except (OSError, ValueError, OverflowError) as error:
            raise PreflightError(
                f"RAY_GCS_SERVER_PORT={wanted} cannot be had: {getattr(error, 'strerror', None) or 'it is no port'}",
                "unset it, and Ray takes a free one",
            ) from error


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """Ray's folder, RAY_TMPDIR's or TMPDIR's; a short link to it where the paths of its sockets would be too long, as in the jobs
    of a Slurm cluster. Raises `PreflightError` where no such link can be made, and where the folder has no room."""
    folder = str(ray_errors.folder())
    with ray_errors.named():
        os.makedirs(folder, exist_ok=True)
        free = shutil.disk_usage(folder).free
    if free < _ROOM:
        raise PreflightError(
            f"'{folder}' has {free / 1e6:.0f} MB free, and Ray takes {_ROOM / 1e6:.0f} MB",
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
            f"the folder of RAY_TMPDIR or TMPDIR, '{os.path.dirname(folder)}', makes a socket's path {length} bytes long, the "
            f"limit is {_SOCKET_BYTES}, and no link to it can be made in {', '.join(_SHORT)}",
            f"set RAY_TMPDIR=FOLDER, whose path has {most} bytes or fewer, before the command",
        )
    try:
        yield link
    finally:
        os.unlink(link)


def _longest(folder: str) -> int:
    """Bytes of the longest path of a socket in Ray's folder."""
    return len(os.fsencode(os.path.join(folder, _SOCKET.format(os.getpid()))))


@contextlib.contextmanager
def _started(**options: Any) -> Iterator[None]:
    """`ray.init` with these options, and its end. A start that takes too long is tried again, `TRIES` times in all."""
    try:
        began = time.monotonic()
        for number in range(1, TRIES + 1):
            try:
                _init(options)
                break
            except PreflightError as error:
                if not _late(error):
                    raise
                if number == TRIES:
                    took = time.monotonic() - began
                    raise PreflightError(
                        f"{error.problem} ({TRIES} times in {took:.0f} s)",
                        f"end other programs on this machine, or {error.fix}",
                    ) from error
                print(f"{error.problem}: trying again, {number + 1} of {TRIES}", file=sys.stderr)
        yield
    finally:
        ray.shutdown()


def _init(options: dict[str, Any]) -> None:
    """Raises `PreflightError`, with every process that was started gone."""
    before = set(psutil.Process().children(recursive=True))
    # Ray's processes are in the terminal's group: by its SIGHUP they would end before a step is saved. They inherit this.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        with ray_errors.named():
            ray.init(**options)
    except PreflightError:
        ray.shutdown()
        end(set(psutil.Process().children(recursive=True)) - before, patience=0)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _late(error: PreflightError) -> bool:
    return re.search(r"timed ?out", error.problem, re.I) is not None
