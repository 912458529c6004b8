"""The fp32 gradients of the CPU engine, in a process of its own: `python -m launch.bench.gpu.smoke.cpu_rank FOLDER`.

The folder has the case. `gradients.safetensors` is written there.
"""

import sys
from pathlib import Path


def main(folder: Path) -> None:
    from launch.megatron import cpu

    cpu.install()
    from safetensors.torch import save_file

    from launch.bench.gpu.measurement import read_case
    from launch.bench.gpu.smoke.rank_checks import gradients_of

    save_file(gradients_of(read_case(folder)), folder / "gradients.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
