"""Plot the sequence lengths of a data set."""

from pathlib import Path

_MAX_POINTS = 1000  # points; more would be indistinguishable


def lengths(path: Path, totals: list[int], supervised: list[int]) -> None:
    """Write an SVG of the tokens per sequence, longest first, with supervised tokens in the foreground.

    If there are more than `_MAX_POINTS` sequences, plot every n-th.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    order = sorted(range(len(totals)), key=lambda i: -totals[i])
    shown = order[:: -(-len(order) // _MAX_POINTS)]
    edges = [len(order) * i / len(shown) for i in range(len(shown) + 1)]
    # A fixed salt and no date: the same data give the same bytes.
    with rc_context({"svg.hashsalt": "limi"}):
        figure = Figure(figsize=(8, 3), layout="constrained")
        axes = figure.subplots()
        for label, values, colour in (("tokens", totals, "#c9d1d9"), ("supervised", supervised, "#1a7f37")):
            axes.stairs([values[i] for i in shown], edges, fill=True, color=colour, label=label)
        axes.set(xlabel=f"{len(totals):,} sequences, longest first", ylabel="tokens")
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0)
        axes.legend(loc="upper right")
        figure.savefig(path, format="svg", metadata={"Date": None})
