"""The software, hardware and settings that figures depend on. `python -m launch.bench.gpu.software` prints it as JSON."""

import json
from importlib.metadata import version
from typing import Any

from launch.megatron.rank_place import ALLOCATOR

ENV = {"PYTORCH_CUDA_ALLOC_CONF": ALLOCATOR, "HF_HUB_OFFLINE": "1"}  # of every process that measures


def environment() -> dict[str, Any]:
    """Return the versions, and the GPU if there is one."""
    import torch

    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "transformers": version("transformers")}
    if gpu is None:
        return versions
    memory = f"{gpu.total_memory / 2**20:.0f} MiB"
    return versions | {"cudnn": torch.backends.cudnn.version(), "gpu": gpu.name, "memory": memory}


if __name__ == "__main__":
    print(json.dumps(environment()))
