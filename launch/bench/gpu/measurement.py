"""One measurement in a process of its own: `python -m launch.bench.gpu.measurement PART FOLDER`.

The folder has the case (`case.json`) and its settled recipe (`config.yaml`), and gets `PART.json`: figures, or how much memory there
was when it ran out.
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
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "case.json", json.dumps(asdict(planned.case)) + "\n")
    write_text(folder / "config.yaml", to_yaml(planned.recipe))


def read_case(folder: Path) -> Planned:
    found = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    sequences, words, parts = (tuple(found[name]) for name in ("sequences", "words", "parts"))
    drawn = Sequences(range(len(sequences)), sequences, "drawn at random")
    case = Case(found["shape"], found["label"], sequences, found["steps"], words, parts)
    return Planned(case, RunPlan(from_yaml(folder / "config.yaml"), drawn, None))


def in_fp32(planned: Planned) -> Planned:
    """For the CPU, whose engine is what the bf16 of a GPU is held against."""
    r = planned.recipe
    exact = replace(r, engine=replace(r.engine, dtype=Dtype.fp32))
    return Planned(planned.case, RunPlan(exact, planned.plan.sequences, None))


def main(part: str, folder: Path) -> None:
    from launch.megatron import cpu

    cpu.install()
    import torch

    from launch.bench.gpu import ours, roofline, theirs

    planned = read_case(folder)
    if part == "cpu":
        planned = in_fp32(planned)
    measure = {"transformers": theirs.measure, "roofline": roofline.measure}.get(part, ours.measure)
    try:
        found = measure(planned)
    except torch.OutOfMemoryError as error:
        found = {"out_of_memory": str(error).splitlines()[0]}
    write_text(folder / f"{part}.json", json.dumps({"environment": environment(), **found}, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
