"""Imports Megatron in a process of its own: `python -m tests.launch.hook late`, before the hook that is refused then; `flash_mla`,
after it, and prints whether Megatron took flash_mla."""

import sys

from launch.megatron import cpu

if __name__ == "__main__":
    if sys.argv[1] == "late":
        import megatron.core  # noqa: F401
    cpu.install()
    import megatron.core.transformer.attention as attention

    print(attention.HAVE_FMLA)
