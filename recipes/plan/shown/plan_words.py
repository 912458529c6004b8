"""Texts and table rows of a plan, shared by the terminal and the HTML page."""

from typing import Any

from recipes.config import Recipe
from recipes.layout import data_parallel

_SHOWN = 24  # most learning rates to print; plan.json has all of them


def headline(s: dict[str, Any]) -> str:
    """Return one sentence with the model, the cluster, the verdict and the fullest rank's memory."""
    c, m, memory = s["cluster"], s["model"], s["memory"]
    gpus = c["nodes"] * c["gpus_per_node"]
    where = f"{gpus} x {c['gpu']}" if s["time"] else f"{gpus} ranks of this machine"
    size = f"{m['total'] / 1e9:,.1f}B parameters" if m["total"] > 1e9 else f"{m['total'] / 1e6:,.2f}M parameters"
    active = f", {m['active'] / 1e9:,.1f}B of them active" if m["active"] < m["total"] and m["total"] > 1e9 else ""
    return (
        f"{m['name']} ({size}{active}) on {where}, engine {s['engine']}: {memory['verdict']}. The fullest rank, of stage "
        f"{memory['peak_stage']}, takes {gigabytes(memory['peak'])} of {gigabytes(memory['limit'])} GB."
    )


def gigabytes(count: float) -> str:
    """Return a number of bytes as text in GB (10^9 bytes)."""
    if 0 < count < 1e8:
        return f"{count / 1e9:.1g}"
    return f"{count / 1e9:,.1f}" if count < 1e11 else f"{count / 1e9:,.0f}"


def duration(seconds: float) -> str:
    """Return a time as text in seconds, minutes or hours."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def degrees_of(r: Recipe) -> dict[str, Any]:
    """Return the layout fields that decide memory and time, as plain values."""
    names = (
        "tp",
        "pp",
        "vpp",
        "cp",
        "ep",
        "etp",
        "first_stage_layers",
        "last_stage_layers",
        "recompute",
        "offload",
        "optimizer_state",
    )
    values = {name: getattr(r.layout, name) for name in names}
    return {k: getattr(v, "value", v) for k, v in values.items()} | {"dp": data_parallel(r)}


def degrees(layout: dict[str, Any]) -> str:
    """Return a layout as one line of text, without fields that are 1, none or at their usual value."""
    words = [f"{n} {layout[n]}" for n in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp") if layout[n] != 1]
    words += [f"{end} stage {n} layers" for end in ("first", "last") if (n := layout[f"{end}_stage_layers"])]
    words += [f"recompute {layout['recompute']}" + ", offloaded" * layout["offload"]] * (layout["recompute"] != "none")
    words += [f"optimizer {layout['optimizer_state']}".replace("_", " ")] * (layout["optimizer_state"] != "resident")
    return ", ".join(words) or "one GPU"


def learning_rates(rates: list[float]) -> str:
    """Return the learning rates as text: all of them if they are few, else the first, the highest and the last."""
    if len(rates) <= _SHOWN:
        return " ".join(f"{r:.1e}" for r in rates)
    peak = rates.index(max(rates))
    return f"{rates[0]:.1e}, {rates[peak]:.1e} in step {peak + 1}, {rates[-1]:.1e} at the end; all in plan.json"


def layout_rows(s: dict[str, Any]) -> list[list[str]]:
    """Return rows of layout field, value, and cost of another value."""
    p = s["layout"]
    meaning = {
        "tp": "tp: tensor parallel", "pp": "pp: pipeline stages", "vpp": "vpp: chunks a stage", "cp": "cp: context parallel",
        "ep": "ep: expert parallel", "etp": "etp: experts' tensor parallel", "dp": "dp: data parallel",
        "recompute": "recompute: in the backward pass", "offload": "offload: saved activations on the host",
        "optimizer_state": "optimizer_state: where it is",
    }  # fmt: skip
    rows = [[words, str(p[n]).replace("_", " ").lower(), p["reasons"].get(n, "")] for n, words in meaning.items()]
    if p["first_stage_layers"] or p["last_stage_layers"]:
        rows.append(["layers of first and last stage", f"{p['first_stage_layers']}, {p['last_stage_layers']}", ""])
    cap = p["max_tokens_per_gpu"]
    return [*rows, ["tokens of a micro-batch, a GPU", f"{cap:,}", f"{cap * p['cp']:,} over cp {p['cp']}"]]


def memory_rows(s: dict[str, Any]) -> list[list[str]]:
    """Return rows of memory part and its GB on each stage."""
    m = s["memory"]
    stages = m["stages"]
    rows = [[part, *(gigabytes(stage[part]) for stage in stages)] for part in stages[0]]
    rows[-1][0] = "total (working or loss)"
    return [*rows, ["of the GPU", *(f"{stage['total'] / m['limit']:.0%}" for stage in stages)]]


def steps_rows(s: dict[str, Any]) -> list[list[str]]:
    """Return rows of name and value about sequences and steps."""
    steps, data = s["steps"], s["sequences"]
    sizes, seen = {min(steps["sizes"]), max(steps["sizes"])}, {*steps["seen"]}
    return [
        [
            "sequences",
            f"{data['count']:,} of {min(data['lengths']):,} to {max(data['lengths']):,} tokens, {data['source']}",
        ],
        ["optimizer steps", f"{steps['count']}, {steps['per_epoch']} an epoch"],
        ["trajectories a step", " to ".join(map(str, sorted(sizes)))],
        ["each trajectory is seen", " to ".join(map(str, sorted(seen))) + " times"],
        ["tokens trained on", f"{steps['tokens']:,}"],
        ["learning rate by step", learning_rates(steps["learning_rates"])],
    ]


def disk_rows(d: dict[str, Any]) -> list[list[str]]:
    """Return rows of name and value about what the run writes to the disk. d: `saves.Saves` as a dictionary."""
    last = ", the last weights alone" if d["checkpoint"] != d["last"] else ", weights alone"
    rows = [
        ["checkpoints", f"{d['count']}, one every {d['interval']} steps{last}"],
        ["one of them, GB", gigabytes(d["checkpoint"])],
        ["the last step's, GB", gigabytes(d["last"])],
        ["the export, GB", gigabytes(d["export"])],
        ["kept at the end, GB", gigabytes(d["kept"])],
        ["at most at once, GB", gigabytes(d["most"])],
    ]
    if d["seconds"] is not None:
        rows += [["time of one save", duration(d["seconds"])], ["time of all writes", duration(d["all_seconds"])]]
    return rows


def released_rows(s: dict[str, Any]) -> list[list[str]]:
    """Return rows of name, value of this recipe, value of the released recipe."""
    released, steps = s["released"], s["steps"]
    layouts = (degrees(s["layout"]), degrees(released["layout"]))
    rows = [
        ["layout", *layouts],
        ["optimizer steps", str(steps["count"]), str(released["steps"])],
        [
            "times a trajectory is seen",
            *(" to ".join(map(str, sorted({*x}))) for x in (steps["seen"], released["seen"])),
        ],
        ["learning rate by step", learning_rates(steps["learning_rates"]), learning_rates(released["learning_rates"])],
        ["fullest GPU, GB", gigabytes(s["memory"]["peak"]), f"{gigabytes(released['peak'])}: {released['verdict']}"],
        ["host of a node, GB", gigabytes(s["memory"]["host"]["total"]), gigabytes(released["host"])],
    ]
    if s["time"]:
        one = s["time"]["seconds"] * s["sequences"]["tokens"] / steps["tokens"]
        rows += [
            ["all optimizer steps", duration(s["time"]["seconds"]), duration(released["seconds"])],
            [
                "as many tokens as an epoch",
                duration(one),
                f"{duration(released['seconds_an_epoch'])}, {released['speed_up']:.2f} x",
            ],
        ]
    return [*rows, ["to be warned of", str(len(s["warnings"])), str(len(released["warnings"]))]]
