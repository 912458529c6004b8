"""Training and export without the sanity check, as a process of its own that a test may kill: `train_only.py name=value ...`"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from rich.console import Console  # noqa: E402

from launch import limi  # noqa: E402
from launch.cli import stages  # noqa: E402
from launch.run import prepare  # noqa: E402


def train(recipe, console):
    """Data, training and export, whatever is there."""
    from launch.cli import train
    from launch.run.run_folder import RunFolder

    plan = prepare.prepare_plan(recipe, console)
    run = RunFolder(recipe, plan.data, plan.heldout)
    if train.trained(plan, run, console):
        train.export_run(recipe, run, console)


if __name__ == "__main__":
    Console.is_terminal = property(lambda self: False)  # type: ignore[assignment]
    stages.STAGES["train"] = replace(stages.STAGES["train"], function="tests.launch.train_only:train")
    sys.exit(limi.main(sys.argv[1:]))
