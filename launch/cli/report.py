"""`report.html`: one self-contained page with a run's recipe, data, curves and sanity table."""

import html
from pathlib import Path
from typing import Any

from data_prep.files import write_text
from data_prep.pack import show
from data_prep.pack.dataset import open_dataset
from data_prep.text.tokenizer import load_tokenizer
from launch.run import metrics
from launch.run.run_plan import BACK, read_plan
from launch.sanity import sanity_page as sanity
from recipes import html_page, json_file
from recipes.config import Recipe


def write_report(recipe: Recipe, root: Path) -> Path:
    """Write the page from the files in the run folder `root`, and return its path."""
    lines = metrics.read_metrics(root / "metrics.jsonl")
    steps = [m for m in lines if "loss" in m]
    plan = read_plan(root)
    with json_file.shape(root / "plan.json", BACK):
        ranks, count = plan["cluster"]["nodes"] * plan["cluster"]["gpus_per_node"], plan["steps"]["count"]
        data_rows = _data_rows(plan, recipe)
    with json_file.shape(root / metrics.NAME, metrics.MEND):
        training = [
            _plot(steps, metrics.heldout_losses(root / metrics.NAME)),
            html_page.table(["", "first", "last"], _first_and_last(steps, lines)),
            _speed(steps),
        ]
    body = [
        f"<h1>{html.escape(recipe.run)}</h1>",
        f'<p class="sub">{html.escape(recipe.model.name)}, {count} steps on {ranks} ranks: {sanity.verdict(root)}</p>',
        "<h2>Training</h2>",
        *training,
        "<h2>Sanity check</h2>",
        *sanity.section(root),
        "<h2>Data</h2>",
        html_page.table(["", "training", "held out"], data_rows),
        "<h2>Training text</h2>",
        '<p class="sub">What is supervised is marked; the shortest and the longest sequence.</p>',
        *_sequences(plan, recipe, root),
        "<h2>Recipe</h2>",
        f"<pre>{html.escape((root / 'config.yaml').read_text(encoding='utf-8'))}</pre>",
    ]
    path = root / "report.html"
    write_text(path, html_page.page(recipe.run, body))
    return path


def _first_and_last(steps: list[dict[str, Any]], lines: list[dict[str, Any]]) -> list[list[str]]:
    heldout = [m["heldout_loss"] for m in lines if "heldout_loss" in m]
    return [
        ["loss, nats a supervised token", f"{steps[0]['loss']:.4f}", f"{steps[-1]['loss']:.4f}"],
        *([["held-out loss", f"{heldout[0]:.4f}", f"{heldout[-1]:.4f}"]] if heldout else []),
        ["gradient norm", f"{steps[0]['grad_norm']:.3f}", f"{steps[-1]['grad_norm']:.3f}"],
        ["learning rate", f"{steps[0]['lr']:.2e}", f"{steps[-1]['lr']:.2e}"],
    ]


def _speed(steps: list[dict[str, Any]]) -> str:
    seconds = sum(m["time"]["step_s"] for m in steps)
    tokens = sum(m["tokens"] for m in steps)
    return f"<p>{tokens:,} tokens in {seconds:,.0f} s of steps: {tokens / seconds:,.0f} tokens a second.</p>"


def _data_rows(plan: dict[str, Any], recipe: Recipe) -> list[list[str]]:
    names = {"records": "trajectories", "sequences": "sequences", "tokens": "tokens", "supervised": "supervised tokens"}
    unseen = plan["heldout"] or dict.fromkeys(names, 0)
    rows = [[label, f"{plan['data'][key]:,}", f"{unseen[key]:,}"] for key, label in names.items()]
    manifest = open_dataset(Path(plan["data"]["folder"])).manifest
    return [
        ["source", html.escape(recipe.data.path), html.escape(recipe.data.heldout or "none")],
        *rows,
        ["proof", html.escape(manifest["proof"]), ""],
    ]


def _sequences(plan: dict[str, Any], recipe: Recipe, root: Path) -> list[str]:
    data = open_dataset(Path(plan["data"]["folder"]))
    tokenizer = load_tokenizer(root / "hf")
    rows = sorted(range(len(data.ids)), key=lambda row: data.lengths[row])
    return [show.page(data, row, tokenizer, recipe) for row in dict.fromkeys((rows[0], rows[-1]))]


def _plot(steps: list[dict[str, Any]], heldout: dict[int, float]) -> str:
    """Return a plot of loss and learning rate over steps, as an embedded PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.2), layout="constrained")
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    at = [m["step"] for m in steps]
    loss.plot(at, [m["loss"] for m in steps], label="training", linewidth=1)
    if heldout:
        loss.plot(list(heldout), list(heldout.values()), "o-", label="held out")
    loss.set(ylabel="loss, nats a supervised token", yscale="log")
    loss.legend()
    rate.plot(at, [m["lr"] for m in steps])
    rate.set(xlabel="step", ylabel="learning rate")
    return html_page.image(figure, "loss and learning rate over steps")
