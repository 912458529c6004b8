"""A plan as one HTML page with plots, from its summary (`plan_summary.summary`)."""

import html
from typing import Any

from recipes import html_page
from recipes.plan.shown.plan_words import (
    degrees,
    disk_rows,
    duration,
    gigabytes,
    headline,
    layout_rows,
    memory_rows,
    released_rows,
    steps_rows,
)

_CLASS = {"fits": "pass", "risky": "odd", "does not fit": "fail"}
_COLOURS = {
    "weights": "#0969da", "gradients": "#54aeff", "optimizer": "#8250df", "activations": "#1a7f37", "working": "#4ac26b",
    "loss": "#bf8700", "communication": "#d4a72c", "fragmentation": "#afb8c1", "runtime": "#6e7781",
}  # fmt: skip


def render(s: dict[str, Any]) -> str:
    """Return the HTML text of a plan's page. s: the plan's summary."""
    m = s["memory"]
    verdict = f'<span class="{_CLASS[m["verdict"]]}">{m["verdict"]}</span>'
    body = [
        f"<h1>{html.escape(s['model']['name'])} on {html.escape(s['cluster']['name'])}: {verdict}</h1>",
        f'<p class="sub">{html.escape(headline(s))}</p>',
        *(f'<p class="odd">{html.escape(w)}</p>' for w in s["warnings"]),
        "<h2>Layout</h2>",
        html_page.table(["", "", "with another value"], _escaped(layout_rows(s))),
        "<h2>Memory</h2>",
        html_page.image(_memory_plot(m), "GPU memory by pipeline stage and part"),
        _memory_table(s),
        _host(m),
        f"<p>The check at the end: {html.escape(s['server'])}.</p>",
        "<h2>Steps</h2>",
        html_page.table(["", ""], _escaped(steps_rows(s))),
        html_page.image(_lengths_plot(s), "tokens of every sequence, and the learning rate of every step"),
    ]
    if s["time"]:
        rows = [[name, duration(x), f"{x / s['time']['seconds']:.1%}"] for name, x in s["time"]["parts"].items()]
        rows.append(["all optimizer steps", duration(s["time"]["seconds"]), f"{s['time']['gpu_hours']:,.1f} GPU-hours"])
        if s["time"]["cost"] is not None:
            rows.append(["cost, in the currency of gpu.hour_price", f"{s['time']['cost']:,.2f}", ""])
        body += [
            "<h2>Time</h2>",
            f'<p class="sub">{s["time"]["tokens_per_second_per_gpu"]:,.0f} tokens a second and GPU, MFU {s["time"]["mfu"]:.1%}. '
            f"{html.escape(s['time']['calibration'])}.</p>",
            html_page.table(["", "time", "share"], rows, figures=True),
            "<h2>The first step</h2>",
            '<p class="sub">Every pass of the slowest data-parallel rank, by pipeline stage: forward light, backward dark.</p>',
            html_page.image(_gantt_plot(s["schedule"]), "passes of every pipeline stage over time"),
        ]
    if s["alternatives"]:
        rows = [
            [degrees(a["layout"]), duration(a["seconds_an_epoch"]), f"{a['gpu_share']:.0%}"] for a in s["alternatives"]
        ]
        body += ["<h2>The best layouts</h2>", html_page.table(["", "an epoch", "GPU memory"], rows, figures=True)]
    body.append("<h2>Beside the released recipe</h2>")
    if isinstance(s["released"], str):
        body.append(f"<p>None: {html.escape(s['released'])}</p>")
    else:
        body.append(html_page.table(["", "this recipe", "released"], _escaped(released_rows(s))))
        body += [f'<p class="odd">released: {html.escape(w)}</p>' for w in s["released"]["warnings"]]
    return html_page.page(f"plan of {s['run']}", body)


def _escaped(rows: list[list[str]]) -> list[list[str]]:
    return [[html.escape(cell) for cell in row] for row in rows]


def _memory_table(s: dict[str, Any]) -> str:
    stages = range(len(s["memory"]["stages"]))
    return html_page.table(["GB by stage", *map(str, stages)], memory_rows(s), figures=True)


def _host(m: dict[str, Any]) -> str:
    host, disk = m["host"], m["disk"]
    rows = [[name.replace("_", " "), gigabytes(value)] for name, value in host.items() if value is not None]
    table = html_page.table(["host memory of a node", "GB"], rows, figures=True)
    return table + html_page.table(["disk", ""], _escaped(disk_rows(disk)), figures=True)


def _memory_plot(m: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    stages = m["stages"]
    figure = Figure(figsize=(8, 1.2 + 0.35 * len(stages)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(stages)
    for part, colour in _COLOURS.items():
        other = {"working": "loss", "loss": "working"}.get(part)  # only the larger of the two counts
        widths = [stage[part] / 1e9 * (other is None or stage[part] > stage[other]) for stage in stages]
        axes.barh(range(len(stages)), widths, left=left, color=colour, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for share, style in ((1.0, "-"), (0.95, ":"), (0.8, "--")):
        axes.axvline(share * m["limit"] / 1e9, color="black", linestyle=style, linewidth=1)
    axes.set(xlabel="GB; lines: 80%, 95% and all of the memory", ylabel="stage", yticks=range(len(stages)))
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=5, fontsize="small")
    return figure


def _lengths_plot(s: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure = Figure(figsize=(8, 3), layout="constrained")
    lengths, rates = figure.subplots(1, 2)
    ordered = sorted(s["sequences"]["lengths"], reverse=True)
    lengths.stairs(ordered, fill=True, color="#0969da")
    cap = s["layout"]["max_tokens_per_gpu"] * s["layout"]["cp"]
    for value, words in ((cap, "cap"), (s["model"]["native_context"], "native context")):
        if value < 1.5 * ordered[0]:
            lengths.axhline(value, color="black", linestyle="--", linewidth=1)
            lengths.annotate(words, (len(ordered), value), ha="right", va="bottom")
    lengths.set(xlabel=f"{len(ordered):,} sequences, longest first", ylabel="tokens")
    lengths.margins(y=0.1)
    lengths.yaxis.set_major_formatter(EngFormatter(sep=""))
    values = s["steps"]["learning_rates"]
    rates.plot(range(1, len(values) + 1), values, "o-" if len(values) < 60 else "-", markersize=3)
    rates.set(xlabel="step", ylabel="learning rate")
    rates.xaxis.set_major_locator(MaxNLocator(integer=True))
    rates.set_ylim(bottom=0)
    return figure


def _gantt_plot(passes: list[dict[str, Any]]) -> Any:
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure

    stages = 1 + max(p["stage"] for p in passes)
    figure = Figure(figsize=(8, 1.2 + 0.35 * stages), layout="constrained")
    axes = figure.subplots()
    for forward, colour in ((True, "#54aeff"), (False, "#0550ae")):
        boxes = [
            [(p["start"], y), (p["end"], y), (p["end"], y + 0.8), (p["start"], y + 0.8)]
            for p in passes
            if p["forward"] is forward
            for y in (p["stage"] - 0.4,)
        ]
        axes.add_collection(PolyCollection(boxes, facecolors=colour, edgecolors="white", linewidths=0.4))
    axes.set(xlabel="seconds", ylabel="stage", yticks=range(stages))
    axes.set_xlim(0, max(p["end"] for p in passes))
    axes.set_ylim(stages - 0.4, -0.6)
    return figure
