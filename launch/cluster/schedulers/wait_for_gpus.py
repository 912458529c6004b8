"""Wait until every GPU has joined a Ray cluster: `wait_for_gpus.py ADDRESS COUNT SECONDS`. Exit with an error after SECONDS."""

import logging
import sys
import time

import ray


def wait(address: str, count: int, seconds: float) -> None:
    deadline, joined = time.monotonic() + seconds, 0
    while joined < count:
        if time.monotonic() > deadline:
            sys.exit(f"{joined} of {count} GPUs are in the cluster after engine.timeout={seconds:g} s")
        time.sleep(2)
        try:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
            joined = int(ray.cluster_resources().get("GPU", 0))
            ray.shutdown()
        except ConnectionError:
            continue  # the head is not up yet


if __name__ == "__main__":
    wait(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
