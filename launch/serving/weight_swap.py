"""Replacement of a running server's weights, so that base and trained model are compared on one server."""

import time

from launch.serving.client import Client
from recipes.errors import SanityError

# SGLang holds a request for a moment after its answer. Weights swapped in that moment leave the old weights' cache in place.
_SETTLES = 0.5
_BUSY = "cache was not flushed"


def load(client: Client, checkpoint: str) -> None:
    """Load the checkpoint's weights into the server and empty its cache. No request may be in flight.

    Raise `SanityError` if they cannot be loaded, or if the server is still busy after `client.timeout` seconds.
    """
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
