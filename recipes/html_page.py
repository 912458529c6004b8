"""Style, tables and plots of the project's HTML pages. A page is a single file without external resources."""

import base64
import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #1a7f37; --bad: #cf222e; --odd: #9a6700; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem } .sub { opacity: .7; margin-top: .25rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100% }
td, th { text-align: left; padding: .4rem .8rem .4rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
table.figures td + td, table.figures th + th { text-align: right; font-variant-numeric: tabular-nums }
.pass { color: var(--good); font-weight: 600 } .fail { color: var(--bad); font-weight: 600 }
.odd { color: var(--odd); font-weight: 600 }
img { width: 100%; height: auto; background: white; border-radius: .5rem }
mark { background: #1a7f3740; color: inherit }
pre { overflow-x: auto; white-space: pre-wrap; padding: 1rem; border: 1px solid var(--line); border-radius: .5rem; font-size: .85rem }
"""


def page(title: str, body: Sequence[str]) -> str:
    """Return the whole document. title: plain text. body: HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], figures: bool = False) -> str:
    """Return a table. head: plain text. rows: HTML cells. figures: all columns except the first are numbers."""
    top = f"<tr>{''.join(f'<th>{html.escape(h)}</th>' for h in head)}</tr>" if any(head) else ""
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    kind = ' class="figures"' if figures else ""
    return f'<div class="scroll"><table{kind}>{top}{body}</table></div>'


def image(figure: "Figure", says: str) -> str:
    """Return a plot as an embedded PNG. says: its description in words (alt text)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(says)}" src="data:image/png;base64,{data}">'
