"""The Ray that this process works with."""

import contextlib
import logging
import os
import secrets
import signal
from collections.abc import Iterator

import ray

from recipes.compose import in_ray_job


@contextlib.contextmanager
def connected(num_cpus: int | None = None, num_gpus: int | None = None) -> Iterator[None]:
    """In a Ray job its cluster, otherwise a Ray of this machine, with what the machine has where these are None; a Ray that was
    started here ends on leaving."""
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        _init(num_cpus, num_gpus)
        # Ray's own handler, set by ray.init, would end this process without the cleanup.
        signal.signal(signal.SIGTERM, on_sigterm)
        yield
    finally:
        ray.shutdown()


def _init(num_cpus: int | None, num_gpus: int | None) -> None:
    if in_ray_job():
        ray.init(log_to_driver=True, logging_level=logging.ERROR)
        return
    for name, value in own_ray().items():
        os.environ.setdefault(name, value)
    ray.init(
        address="local",
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        include_dashboard=False,
        object_store_memory=100 << 20,  # only small messages pass: data and weights are read from files
        logging_level=logging.ERROR,
        log_to_driver=True,
    )


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
    }
