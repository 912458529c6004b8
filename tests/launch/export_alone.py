"""An export in a process of its own: `python -m tests.launch.export_alone RECIPE CHECKPOINT TARGET [BATCH_BYTES]`. Prints what the
command prints, and last by how many bytes the process grew. Fails where the export imported what it must do without."""

import resource
import sys
from pathlib import Path

from rich.console import Console

from launch.export import export
from recipes.compose.recipe import from_yaml


def largest() -> int:
    """Bytes of memory that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(recipe: str, checkpoint: str, target: str, batch_bytes: str = "") -> None:
    if batch_bytes:
        export.BATCH_BYTES = int(batch_bytes)
    before = largest()
    export.export_checkpoint(from_yaml(Path(recipe)), Path(checkpoint), Path(target), Console(soft_wrap=True))
    grown = largest() - before
    assert not [m for m in sys.modules if m.partition(".")[0] in ("megatron", "ray", "transformers")]
    print(grown)


if __name__ == "__main__":
    main(*sys.argv[1:])
