"""Results of `make bench-gpu` as the text of `launch/bench/GPU.md`: `python -m launch.bench.gpu.gpu_report FOLDER`.

The folder has one folder a row, and `smoke.json`. The text has the tables, the verdict on each target, the efficiencies for
`hydra_conf/gpu`, and what no call measured. It needs no GPU.
"""

import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.bench.gpu.cases import CASES, PROFILE, PUBLISHED, Planned
from launch.bench.gpu.cases import planned as plan_of
from launch.bench.gpu.measurement import read_case, results
from launch.bench.gpu.table import HEAD, NONE, line, step_seconds
from recipes import json_file
from recipes.plan.planner import RunPlan

Row = tuple[Planned, dict[str, Any]]
RATIO, SHARE, OFF = 1.3, 0.85, 0.05  # targets: beside transformers at 32k; of the roofline; of the measured peak
LONGEST = "4B-152k"
SHOWN = 15  # kernels of a profile
PARTS = ("products", "attention", "attention backward")


def tables(rows: Sequence[Row]) -> str:
    """Return the table of the rows, then what follows from it."""
    parts = [
        f"| {' | '.join(HEAD)} |\n{'|---' * len(HEAD)}|",
        *(line(*row) for row in rows),
        f"| to reach | | | | ≥ {RATIO} × at 32k | ≥ {SHARE:.0%} | | | | {OFF:.0%} | |",
        "",
        *_software(rows),
        *_notes(rows),
        *_published(rows),
        *_calibrated(rows),
        *_profiles(rows),
        "",
        *_verdicts(rows),
    ]
    return "\n".join(parts)


def _software(rows: Sequence[Row]) -> Iterator[str]:
    of_rows = [part["environment"] for _, measured in rows for part in measured.values()]
    texts = dict.fromkeys(", ".join(f"{name} {value}" for name, value in one.items()) for one in of_rows)
    yield "\n".join(f"- **Software and GPU**: {text}." for text in texts) or "Nothing has been measured yet."


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    """Yield what a row's cells do not show: kernels, chunks of transformers' loss, and why something is missing."""
    for planned, measured in rows:
        said = []
        if kernel := measured.get("ours", {}).get("attention"):
            said.append(f"attention by {kernel}")
        theirs = measured.get("theirs", {})
        if "attention" in theirs:
            chunks = ", its loss in chunks" if theirs.get("loss_in_chunks") else ""
            peak = f", peak {theirs['peak'] / 1e9:.1f} GB" if theirs.get("peak") else ""
            said.append(f"transformers with {theirs['attention']}{chunks}{peak}")
        both = [measured[side].get("loss") for side in ("ours", "theirs") if side in measured]
        if len(both) == 2 and None not in both:
            said.append(f"loss of the first step {both[0]:.4f} and {both[1]:.4f}")
        for side, figures in measured.items():
            said += [f"{side}: {figures[why]}" for why in ("out_of_memory", "failed") if why in figures]
            if len(figures.get("seconds", ())) > 1 and side in ("ours", "theirs"):
                said.append(f"{side}: steps of {', '.join(f'{s:.1f}' for s in figures['seconds'])} s")
        if said:
            yield f"- **{planned.case.name}**: {'; '.join(said)}."


def _published(rows: Sequence[Row]) -> Iterator[str]:
    for planned, measured in rows:
        published, step = PUBLISHED.get(planned.case.key), step_seconds(measured, "ours")
        if published and step:
            speed = planned.case.tokens / step
            yield (
                f"- **{planned.case.name} beside published figures**: {speed:,.0f} tokens/s; {published.source}: "
                f"{published.tokens_s:,.0f} tokens/s on {published.where}."
            )


def _calibrated(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the median efficiencies of the measured rows for `hydra_conf/gpu`: fitted on every second row of the first row's shape,
    and checked on the others. Smaller shapes attain less in matrix products."""
    whole = [(p, f) for p, f in rows if step_seconds(f, "roofline")]
    if not whole:
        return
    r = whole[0][0].recipe
    kernel = r.gpu.attention.value
    names = ("matmul_efficiency", f"{kernel}_efficiency", f"{kernel}_backward_efficiency")
    fitted = [(p, f) for p, f in whole if p.case.shape == whole[0][0].case.shape][::2]
    shares = {
        name: statistics.median(f["roofline"]["tflops"][part] for _, f in fitted) / (r.gpu.bf16_tflops or math.nan)
        for part, name in zip(PARTS, names, strict=True)
    }
    figures = " ".join(f"{name}={value:.2f}" for name, value in shares.items())
    yield f"- **For `hydra_conf/gpu`**, from {', '.join(p.case.name for p, _ in fitted)}: {figures}."
    used = [p for p, _ in fitted]
    held = [(p, step) for p, f in rows if p not in used and (step := step_seconds(f, "ours"))]
    errors = [f"{predicted(p, shares) / step - 1:+.0%} on {p.case.name}" for p, step in held]
    if errors:
        yield f"  A step predicted with them: {', '.join(errors)}."


def predicted(planned: Planned, shares: dict[str, float]) -> float:
    """Return the predicted seconds of a step. shares: the GPU's efficiencies, as shares of its peak rate."""
    gpu = copy(planned.recipe.gpu)
    for name, value in shares.items():
        setattr(gpu, name, value)
    return Planned(planned.case, RunPlan(replace(planned.recipe, gpu=gpu), planned.plan.sequences, None)).step_seconds


def _profiles(rows: Sequence[Row]) -> Iterator[str]:
    for planned, measured in rows:
        profile = measured.get(PROFILE, {})
        if "kernels" not in profile:
            continue
        total = profile["all_kernels"]
        yield (
            f"\n**One step of {planned.case.name}**, {profile['seconds'][0]:.1f} s, of which kernels {total:.1f} s:\n\n"
            "| kernel | calls | seconds | of all |\n|---|---|---|---|"
        )
        for name, calls, seconds in profile["kernels"][:SHOWN]:
            yield f"| `{name[:90].replace('|', ' ')}` | {calls:,} | {seconds:.2f} | {seconds / total:.0%} |"


def _verdicts(rows: Sequence[Row]) -> Iterator[str]:
    """Yield whether each target is reached."""
    yield "| target | measured | reached |\n|---|---|---|"
    at_32k = [(p, f) for p, f in rows if p.case.label == "32k"]
    ratios = [
        (p, theirs / ours)
        for p, f in at_32k
        if (ours := step_seconds(f, "ours")) and (theirs := step_seconds(f, "theirs"))
    ]
    yield _verdict(f"≥ {RATIO} × transformers at 32k", [(p, f"{x:.2f} ×", x >= RATIO) for p, x in ratios])
    shares = [
        (p, least / step)
        for p, f in rows
        if (step := step_seconds(f, "ours")) and (least := step_seconds(f, "roofline"))
    ]
    yield _verdict(f"≥ {SHARE:.0%} of the roofline", [(p, f"{x:.0%}", x >= SHARE) for p, x in shares])
    off = [(p, p.allocated / f["ours"]["peak"] - 1) for p, f in rows if step_seconds(f, "ours") and f["ours"]["peak"]]
    yield _verdict(f"peak within {OFF:.0%} of the plan", [(p, f"{x:+.1%}", abs(x) <= OFF) for p, x in off])
    longest = [(p, *_fits(f["ours"])) for p, f in rows if p.case.key == LONGEST and "ours" in f]
    yield _verdict("152k tokens on one GPU", longest)


def _fits(ours: dict[str, Any]) -> tuple[str, bool]:
    """Return what became of a row, and whether it was trained."""
    if seconds := ours.get("seconds"):
        return f"{statistics.median(seconds):.1f} s a step", True
    return ("out of memory" if "out_of_memory" in ours else "failed"), False


def _verdict(target: str, found: list[tuple[Planned, str, bool]]) -> str:
    text = ", ".join(f"{p.case.name} {figure}" for p, figure, _ in found) or NONE
    answer = "–" if not found else "yes" if all(good for *_, good in found) else "no"
    return f"| {target} | {text} | {answer} |"


def read_rows(folder: Path) -> list[Row]:
    """Return all rows, in the order of `CASES`. The folder's name is the cluster's; a row that is not in it is planned there."""
    folders = [folder / case.key for case in CASES]
    return [
        (read_case(one), results(one))
        if (one / "case.json").is_file()
        else (plan_of(case, [f"cluster={folder.name}"]), {})
        for case, one in zip(CASES, folders, strict=True)
    ]


def main(folder: Path) -> None:
    if not [*folder.glob("*/case.json")]:
        sys.exit(f"'{folder}' has no row of make bench-gpu")
    rows = read_rows(folder)
    if (folder / "smoke.json").is_file():
        from launch.bench.gpu.smoke.smoke import smoke_table

        print(smoke_table(json_file.read_json(folder / "smoke.json", "remove it")), end="\n\n")
    print(tables(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
