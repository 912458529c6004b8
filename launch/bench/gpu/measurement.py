"""One measurement in its own process: `python -m launch.bench.gpu.measurement PART FOLDER`.

The folder has the case (`case.json`) and its resolved recipe (`config.yaml`). The measurement writes `PART.json`: the figures, or the
out-of-memory message.
"""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from data_prep.files import write_text
from launch.bench.gpu.cases import Case, Planned
from launch.bench.gpu.software import environment
from recipes.compose.recipe import from_yaml, to_yaml
from recipes.config import Dtype
from recipes.plan.planner import RunPlan
from recipes.plan.search import Sequences


def write_case(folder: Path, planned: Planned) -> None:
    """Write a case and its recipe to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "case.json", json.dumps(asdict(planned.case)) + "\n")
    write_text(folder / "config.yaml", to_yaml(planned.recipe))


def read_case(folder: Path) -> Planned:
    """Read a case and its recipe from a folder."""
    record = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    sequences, words, parts = (tuple(record[name]) for name in ("sequences", "words", "parts"))
    drawn = Sequences(range(len(sequences)), sequences, "drawn at random")
    case = Case(record["shape"], record["label"], sequences, record["steps"], words, parts)
    return Planned(case, RunPlan(from_yaml(folder / "config.yaml"), drawn, None))


def in_fp32(planned: Planned) -> Planned:
    """Return the case in fp32, for the CPU. The engine on the CPU is the reference for a GPU's bf16."""
    r = planned.recipe
    exact = replace(r, engine=replace(r.engine, dtype=Dtype.fp32))
    return Planned(planned.case, RunPlan(exact, planned.plan.sequences, None))


def main(part: str, folder: Path) -> None:
    """Measure one part of the case in a folder, and write `PART.json` there."""
    from launch.megatron import cpu

    cpu.install()
    import torch

    from launch.bench.gpu import ours, roofline, theirs

    planned = read_case(folder)
    if part == "cpu":
        planned = in_fp32(planned)
    measure = {"transformers": theirs.measure_transformers, "roofline": roofline.measure_roofline}.get(
        part, ours.measure_embedded
    )
    try:
        figures = measure(planned)
    except torch.OutOfMemoryError as error:
        figures = {"out_of_memory": str(error).splitlines()[0]}
    write_text(folder / f"{part}.json", json.dumps({"environment": environment(), **figures}, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
