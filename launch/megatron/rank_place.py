"""What the driver gives to a rank: its identity, and PyTorch's settings. It has its own file: the driver does not import torch."""

from dataclasses import dataclass

# PYTORCH_CUDA_ALLOC_CONF. Without expandable segments, sequences of different lengths fragment the memory. Host memory that several
# threads register is pinned in 0.6 s a GiB instead of 0.7 (launch/bench/GPU.md).
ALLOCATOR = "expandable_segments:True,pinned_use_cuda_host_register:True,pinned_num_register_threads:8"


@dataclass(frozen=True)
class Place:
    """A rank's global number, its number on its node (a GPU or a share of the cores), and the address of the rendezvous store."""

    rank: int
    local_rank: int
    host: str
    port: int
