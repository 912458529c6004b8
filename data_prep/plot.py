"""A plot of how long the sequences of a data set are."""

from pathlib import Path


def lengths(path: Path, totals: list[int], supervised: list[int]) -> None:
    """Writes an SVG: every sequence as a bar, longest first, its supervised tokens in the foreground."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    order = sorted(range(len(totals)), key=lambda i: -totals[i])
    # The same data give the same bytes.
    with rc_context({"svg.hashsalt": "limi"}):
        figure = Figure(figsize=(8, 3), layout="constrained")
        axes = figure.subplots()
        axes.bar(range(len(order)), [totals[i] for i in order], width=1.0, color="#c9d1d9", label="tokens")
        axes.bar(range(len(order)), [supervised[i] for i in order], width=1.0, color="#1a7f37", label="supervised")
        axes.set(xlabel=f"{len(totals):,} sequences, longest first", ylabel="tokens")
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.margins(x=0)
        axes.legend()
        figure.savefig(path, format="svg", metadata={"Date": None})
