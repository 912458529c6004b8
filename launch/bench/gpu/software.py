"""The software and hardware that figures depend on. `python -m launch.bench.gpu.software` prints it as JSON."""

import json
from typing import Any


def environment() -> dict[str, Any]:
    """Return the versions, and the GPU if there is one."""
    import torch
    import transformers

    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "transformers": transformers.__version__}
    return versions | ({"gpu": gpu.name, "memory": f"{gpu.total_memory / 2**20:.0f} MiB"} if gpu else {})


if __name__ == "__main__":
    print(json.dumps(environment()))
