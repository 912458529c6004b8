"""`report.html`: one self-contained page of a run: recipe, data, curves, sanity table."""

import html
import json
from pathlib import Path
from typing import Any

from data_prep import show
from data_prep.chat import load_tokenizer
from data_prep.dataset import open_dataset
from data_prep.files import write_text
from launch import metrics
from launch.run_folder import RunFolder
from launch.sanity import moved_page
from recipes import page

_CLASSES = {"pass": "pass", "warn": "odd", "fail": "fail"}  # of the page's style, by outcome


def write(run: RunFolder) -> Path:
    """Writes the page from what the run folder holds and returns its path."""
    lines = metrics.read(run.root / "metrics.jsonl")
    steps = [m for m in lines if "loss" in m]
    plan = json.loads((run.root / "plan.json").read_text())
    ranks = plan["cluster"]["nodes"] * plan["cluster"]["gpus_per_node"]
    found = run.root / "sanity.json"
    checks = json.loads(found.read_text()) if found.is_file() else []
    passed = all(c["outcome"] != "fail" for c in checks)
    verdict = '<span class="pass">all checks passed</span>' if passed else '<span class="fail">a check failed</span>'
    verdict = verdict if checks else "not checked"
    body = [
        f"<h1>{html.escape(run.recipe.run)}</h1>",
        f'<p class="sub">{html.escape(run.recipe.model.name)}, {plan["steps"]["count"]} steps on {ranks} ranks: {verdict}</p>',
        "<h2>Training</h2>",
        _plot(steps, metrics.heldout_losses(run.root / "metrics.jsonl")),
        page.table(["", "first", "last"], _first_and_last(steps, lines)),
        _speed(steps),
        "<h2>Sanity check</h2>",
        page.table(["", "check", "protects from", "figure", "limit"], [_check_row(c) for c in checks]),
        _moved(run),
        "<h2>Data</h2>",
        page.table(["", "training", "held out"], _data_rows(plan, run)),
        "<h2>Training text</h2>",
        '<p class="sub">What is supervised is marked; the shortest and the longest sequence.</p>',
        *_sequences(plan, run),
        "<h2>Recipe</h2>",
        f"<pre>{html.escape((run.root / 'config.yaml').read_text())}</pre>",
    ]
    path = run.root / "report.html"
    write_text(path, page.page(run.recipe.run, body))
    return path


def _moved(run: RunFolder) -> str:
    path = run.root / "moved.json"
    return moved_page.plot(json.loads(path.read_text())) if path.is_file() else ""


def _check_row(c: dict[str, Any]) -> list[str]:
    mark = f'<span class="{_CLASSES[c["outcome"]]}">{c["outcome"]}</span>'
    detail = f"<br><small>{html.escape(c['detail'])}</small>" if c["detail"] else ""
    return [
        mark,
        html.escape(c["name"]),
        html.escape(c["protects_from"]),
        html.escape(c["figure"]) + detail,
        html.escape(c["limit"]),
    ]


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


def _data_rows(plan: dict[str, Any], run: RunFolder) -> list[list[str]]:
    names = {"records": "trajectories", "sequences": "sequences", "tokens": "tokens", "supervised": "supervised tokens"}
    unseen = plan["heldout"] or dict.fromkeys(names, 0)
    rows = [[label, f"{plan['data'][key]:,}", f"{unseen[key]:,}"] for key, label in names.items()]
    manifest = json.loads((Path(plan["data"]["folder"]) / "manifest.json").read_text())
    return [
        ["source", html.escape(run.recipe.data.path), html.escape(run.recipe.data.heldout or "none")],
        *rows,
        ["proof", html.escape(manifest["proof"]), ""],
    ]


def _sequences(plan: dict[str, Any], run: RunFolder) -> list[str]:
    data = open_dataset(Path(plan["data"]["folder"]))
    tokenizer = load_tokenizer(run.hf)
    rows = sorted(range(len(data.ids)), key=lambda row: data.lengths[row])
    return [show.page(data, row, tokenizer, run.recipe) for row in dict.fromkeys((rows[0], rows[-1]))]


def _plot(steps: list[dict[str, Any]], heldout: dict[int, float]) -> str:
    """Loss and learning rate over steps, as an embedded PNG."""
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
    return page.image(figure, "loss and learning rate over steps")
