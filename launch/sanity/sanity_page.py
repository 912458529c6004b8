"""Results of the sanity check as a section of `report.html`, or as a separate page, `sanity.html`."""

import html
import json
from pathlib import Path
from typing import Any

from data_prep.files import write_text
from launch.sanity.files import moved_plot as moved_page
from launch.sanity.likelihood import likelihood_plot as likelihood_page
from launch.sanity.subject import Subject
from recipes import html_page

_CLASSES = {"pass": "pass", "warn": "odd", "fail": "fail"}  # CSS class by outcome
_PLOTS = {"likelihood.json": likelihood_page.plot, "moved.json": moved_page.plot}


def write_sanity_page(subject: Subject) -> Path:
    """Write the page of an export that is not its run's last one, and return its path. A run's last export is in the run's report."""
    path = subject.folder / "sanity.html"
    name = str(subject.export)
    body = [
        f"<h1>{html.escape(name)}</h1>",
        f'<p class="sub">compared with {html.escape(subject.recipe.model.checkpoint)}: {verdict(subject.folder)}</p>',
    ]
    write_text(path, html_page.page(name, [*body, *section(subject.folder)]))
    return path


def verdict(folder: Path) -> str:
    """Return the overall result of a folder's checks, as HTML."""
    if not (checks := _read(folder)):
        return "not checked"
    failed = any(c["outcome"] == "fail" for c in checks)
    return '<span class="fail">a check failed</span>' if failed else '<span class="pass">all checks passed</span>'


def section(folder: Path) -> list[str]:
    """Return the table and the plots of a folder's results, as HTML."""
    table = html_page.table(["", "check", "protects from", "figure", "limit"], [_row(c) for c in _read(folder)])
    there = {folder / name: plot for name, plot in _PLOTS.items() if (folder / name).is_file()}
    return [table, *(plot(json.loads(path.read_text(encoding="utf-8"))) for path, plot in there.items())]


def _read(folder: Path) -> list[dict[str, Any]]:
    path = folder / "sanity.json"
    return list(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else []


def _row(c: dict[str, Any]) -> list[str]:
    detail = f"<br><small>{html.escape(c['detail'])}</small>" if c["detail"] else ""
    return [
        f'<span class="{_CLASSES[c["outcome"]]}">{c["outcome"]}</span>', html.escape(c["name"]), html.escape(c["protects_from"]),
        html.escape(c["figure"]) + detail, html.escape(c["limit"]),
    ]  # fmt: skip
