"""The store through which the ranks of a process group meet."""

import socket
from typing import Any


def open_store(host: str) -> tuple[Any, int]:
    """Open torch's `TCPStore` on a free port of this node. Return the store and the port."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    # The bound socket is handed over, so that no other process can take the port in between.
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    return store, port
