"""Other weights for a server that runs: base and trained are compared on one."""

import time

from launch.serving.client import Client
from recipes.errors import SanityError

# SGLang keeps a request for a moment after its answer, and then changes the weights without emptying the cache made by those before.
_SETTLES = 0.5
_BUSY = "cache was not flushed"


def load(client: Client, checkpoint: str) -> None:
    """The server's weights become the checkpoint's, and its cache is empty. Nothing may be in flight.

    Raises `SanityError` where they cannot be loaded, or the server is still busy after `client.timeout` seconds."""
    deadline = time.monotonic() + client.timeout
    while True:
        time.sleep(_SETTLES)
        try:
            answer = client.post("/update_weights_from_disk", {"model_path": checkpoint})
        except SanityError as error:
            if _BUSY not in str(error) or time.monotonic() > deadline:
                raise
            continue
        if not answer["success"]:
            raise SanityError(f"SGLang could not load the weights of {checkpoint}: {answer['message']}")
        return
