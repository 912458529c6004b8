"""The report's plot of what training moved."""

from typing import Any

from recipes import html_page


def plot(moved: dict[str, Any]) -> str:
    """Return a heat map: the share of elements that changed as bf16, by layer and kind of tensor. moved: content of `moved.json`."""
    import numpy as np
    from matplotlib.figure import Figure

    cells = moved["cells"]
    kinds = list(dict.fromkeys(c["kind"] for c in cells))
    inside = sorted({c["layer"] for c in cells if c["layer"] is not None})
    rows = [*([None] if any(c["layer"] is None for c in cells) else []), *inside]
    shares = np.full((len(rows), len(kinds)), np.nan)
    for c in cells:
        shares[rows.index(c["layer"]), kinds.index(c["kind"])] = 100 * c["share"]
    figure = Figure(figsize=(9, min(14.0, 2.5 + 0.22 * len(rows))), layout="constrained")
    axes = figure.subplots()
    heat = axes.imshow(shares, aspect="auto", vmin=0, vmax=100, cmap="viridis", interpolation="nearest")
    axes.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right", rotation_mode="anchor")
    every = max(1, len(rows) // 24)
    axes.set_yticks(range(0, len(rows), every), ["outside" if r is None else str(r) for r in rows[::every]])
    axes.set(ylabel="layer")
    figure.colorbar(heat, ax=axes, label="elements moved, %")
    return html_page.image(figure, "share of elements that training moved, by layer and kind of tensor")
