"""One measurement in its own process: `python -m launch.bench.gpu.measurement SIDE FOLDER`.

The folder has the case (`case.json`) and its resolved recipe (`config.yaml`). The measurement writes `SIDE.json`: the versions and
the figures, again after every step, so that a process that is ended loses at most the step at hand. A later process goes on. What
cannot be measured is written too: `out_of_memory` or `failed`, with the reason.
"""

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_prep.files import write_text
from launch.bench.gpu.cases import PROFILE, Case, Planned
from launch.bench.gpu.software import environment
from recipes import json_file
from recipes.compose.recipe import from_yaml, to_yaml
from recipes.plan.planner import RunPlan
from recipes.plan.search import Sequences

Figures = dict[str, Any]
Measure = Callable[
    [Planned, Figures, Callable[[Figures], None]], None
]  # the case, earlier figures, and what writes new ones


def write_case(folder: Path, planned: Planned) -> None:
    """Write a case and its recipe to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "case.json", json.dumps(asdict(planned.case)) + "\n")
    write_text(folder / "config.yaml", to_yaml(planned.recipe))


def read_case(folder: Path) -> Planned:
    """Read a case and its recipe from a folder."""
    record = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    sequences, words = (tuple(record[name]) for name in ("sequences", "words"))
    drawn = Sequences(range(len(sequences)), sequences, "drawn at random")
    case = Case(record["shape"], record["label"], sequences, record["steps"], words)
    return Planned(case, RunPlan(from_yaml(folder / "config.yaml"), drawn, None))


def results(folder: Path) -> dict[str, Figures]:
    """Return the measurements in a case's folder by side, complete or not."""
    paths = (path for path in sorted(folder.glob("*.json")) if path.name != "case.json")
    return {path.stem: json_file.read_json(path, "remove that file: the next call measures it anew") for path in paths}


def complete(figures: Figures | None, steps: int) -> bool:
    """Return whether nothing is left to measure: every step has its seconds, or there is a reason why not."""
    if not figures:
        return False
    return "out_of_memory" in figures or "failed" in figures or len(figures.get("seconds", ())) >= steps


def fail(folder: Path, side: str, reason: str) -> None:
    """Write that a side cannot be measured, beside the steps that were."""
    known = results(folder).get(side) or {"environment": environment()}
    write_text(folder / f"{side}.json", json.dumps({**known, "failed": reason}, indent=2) + "\n")


def main(side: str, folder: Path) -> int:
    """Measure what is left of one side of the case in a folder. Return the exit status: 1 after a failure."""
    from launch.megatron import cpu

    cpu.install()
    import torch

    from launch.bench.gpu import ours, roofline, theirs

    measures: dict[str, Measure] = {
        "roofline": roofline.measure_roofline,
        "ours": ours.measure_embedded,
        "theirs": theirs.measure_transformers,
        PROFILE: ours.profile_embedded,
    }
    planned, known = read_case(folder), results(folder).get(side, {})

    def write(figures: Figures) -> None:
        nonlocal known
        known = {"environment": environment(), **known, **figures}
        write_text(folder / f"{side}.json", json.dumps(known, indent=2) + "\n")

    try:
        measures[side](planned, known, write)
    except torch.OutOfMemoryError as error:
        write({"out_of_memory": str(error).splitlines()[0]})
    except Exception as error:
        traceback.print_exc()
        write({"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
