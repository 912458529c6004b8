"""Where the ranks of a process group meet."""

import socket
from typing import Any


def open_store(host: str) -> tuple[Any, int]:
    """torch's store on a free port of this node, and the port."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    # Bound here and handed over, so that no other process can take the port in between.
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    return store, port
