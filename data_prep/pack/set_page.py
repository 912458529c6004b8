"""`make inspect html=true`: the page of a data set: a table of its records that sorts and filters, and a reader of each trajectory.

`index.html` has the table, `read/N.html` the text of the Nth kept record with roles, supervised tokens and the boundaries of its
sequences. Text of the data is escaped everywhere, and nothing is loaded from elsewhere.
"""

import html
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.files import whole_folder
from data_prep.pack.dataset import Dataset
from data_prep.pack.show import Block, blocks, heading, visible
from recipes import html_page
from recipes.config import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OPEN = 1000  # tokens of a message without supervised ones that is shown opened
READERS = 1000  # readers written at most; the table has all records
_SHOWN = 500  # rows of the table drawn at a time
# Metadata that says how it ended.
_OUTCOMES = ("outcome", "resolved", "reward", "passed", "score", "exit_status", "success")
_HEAD = ("record", "status", "sequences", "tokens", "supervised", "turns", "tools", "outcome", "notes")
_SCRIPT = """
const rows = JSON.parse(document.getElementById('rows').textContent), most = %(most)d;
const body = document.querySelector('tbody'), filter = document.getElementById('filter'), count = document.getElementById('count');
let by = -1, up = 1;
function draw() {
  const words = filter.value.toLowerCase().split(/\\s+/).filter(w => w);
  let found = rows.filter(r => words.every(w => r.text.includes(w)));
  if (by >= 0) found = [...found].sort((a, b) => {
    const [x, y] = [a.cells[by], b.cells[by]];
    return up * (typeof x === 'number' && typeof y === 'number' ? x - y : String(x).localeCompare(String(y)));
  });
  count.textContent = `${found.length.toLocaleString()} of ${rows.length.toLocaleString()} records`
    + (found.length > most ? `, the first ${most} shown` : '');
  body.replaceChildren(...found.slice(0, most).map(r => {
    const tr = document.createElement('tr');
    r.cells.forEach((value, n) => {
      const td = document.createElement('td');
      if (n === 0 && r.page) {
        const a = document.createElement('a'); a.href = r.page; a.textContent = value; td.append(a);
      } else td.textContent = typeof value === 'number' ? value.toLocaleString() : value;
      if (n === 1) td.className = value === 'kept' ? 'pass' : 'fail';
      tr.append(td);
    });
    return tr;
  }));
}
document.querySelectorAll('th').forEach((th, n) => th.onclick = () => { up = by === n ? -up : 1; by = n; draw(); });
filter.oninput = draw; draw();
"""
_STYLE = """<style>
body { max-width: 90rem } th { cursor: pointer; user-select: none; white-space: nowrap }
#filter { font: inherit; width: 100%; box-sizing: border-box; padding: .4rem }
td:nth-child(n+3):nth-child(-n+7) { text-align: right; font-variant-numeric: tabular-nums } td:first-child { word-break: break-all }
td:last-child { font-size: .85rem; max-width: 40rem }
</style>"""


def write_set_page(
    data: Dataset, name: str, tokenizer: "PreTrainedTokenizerBase", recipe: Recipe, advance: Callable[[], None]
) -> Path:
    """Write the pages of a data set, and return the table's path. name: training or held out. Call `advance` after each reader."""
    folder = Path(recipe.cluster.root) / "inspect" / data.folder.name
    shutil.rmtree(folder, ignore_errors=True)
    shown = {
        c["id"]: {k: c.get(k) for k in ("tools", "metadata")} for c in data.conversations()
    }  # without its messages
    rows_of: dict[str, list[int]] = {}
    for row, identity in enumerate(data.ids):
        rows_of.setdefault(identity, []).append(row)
    with whole_folder(folder) as scratch:
        (scratch / "read").mkdir()
        listed, written = [], 0
        for line in data.ledger():
            page = None
            if written < READERS and line["status"] == "kept":
                written += 1
                page = f"read/{written}.html"
                text = _reader(data, rows_of[line["id"]], line, tokenizer, recipe)
                (scratch / page).write_text(text, encoding="utf-8")
                advance()
            listed.append(_row(line, shown.get(line["id"], {}), page))
        (scratch / "index.html").write_text(_table(data, name, listed), encoding="utf-8")
    return folder / "index.html"


def _row(line: dict[str, Any], conversation: dict[str, Any], page: str | None) -> dict[str, Any]:
    metadata = conversation.get("metadata") or {}
    outcome = next((f"{n} {metadata[n]}" for n in _OUTCOMES if n in metadata), "")
    notes = line["reason"] if line["status"] == "rejected" else "; ".join(grouped(line.get("repairs", [])))
    status = line["status"] if line["status"] == "kept" else f"{line['status']}: {line['code']}"
    cells = [
        visible(line["id"] or line["record"]), status, line.get("segments", 0), line.get("tokens", 0), line.get("supervised", 0),
        line.get("turns", 0), len(conversation.get("tools", [])), visible(outcome), visible(notes),
    ]  # fmt: skip
    names = " ".join(t["function"]["name"] for t in conversation.get("tools", []))
    return {"cells": cells, "page": page, "text": f"{' '.join(map(str, cells))} {line['record']} {names}".lower()}


def grouped(repairs: list[str]) -> list[str]:
    """Return repairs of which those of several messages are one: `messages 2, 4 and 7 more: …`."""
    places: dict[str, list[str]] = {}
    for repair in repairs:
        found = re.fullmatch(r"message (\d+): (.*)", repair, re.DOTALL)
        places.setdefault(found[2] if found else repair, []).extend([found[1]] if found else [])
    out = []
    for text, numbers in places.items():
        more = f" and {len(numbers) - 3} more" if len(numbers) > 3 else ""
        named = f"message{'s' * (len(numbers) > 1)} {', '.join(numbers[:3])}{more}: "
        out.append((named if numbers else "") + text)
    return out


def _table(data: Dataset, name: str, rows: list[dict[str, Any]]) -> str:
    counts = data.manifest["counts"]
    said = f"{counts['records']:,} records, {counts['kept']:,} kept, {counts['tokens']:,} tokens, {counts['supervised']:,} supervised"
    if counts["kept"] > READERS:
        said += f"; the first {READERS:,} kept can be read here, and any with make inspect id=ID"
    # No </script> inside the data can end the element.
    text = json.dumps(rows, ensure_ascii=False).replace("<", "\\u003c")
    head = "".join(f"<th>{h}</th>" for h in _HEAD)
    body = [
        _STYLE,
        f"<h1>{html.escape(name)}</h1><p class=sub>{html.escape(str(data.folder))}: {said}</p>",
        '<input id=filter placeholder="filter: words of id, status, code, notes, tools; a click on a head sorts">',
        f"<p id=count class=sub></p><div class=scroll><table><thead><tr>{head}</tr></thead><tbody></tbody></table></div>",
        '<script type="application/json" id=rows>',
        f"{text}</script><script>{_SCRIPT % {'most': _SHOWN}}</script>",
    ]
    return html_page.page(f"{name}, {data.folder.name}", body)


def _reader(
    data: Dataset, rows: list[int], line: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", recipe: Recipe
) -> str:
    out = [f'<p class=sub><a href="../index.html">all records</a></p><h1>{html.escape(visible(line["id"]))}</h1>']
    out.append(f"<p class=sub>{html.escape(visible('; '.join(grouped(line.get('repairs', []))) or 'no repairs'))}</p>")
    for row in rows:
        out.append(f"<h2>{html.escape(heading(data, row))}</h2>")
        out += [_block(block) for block in blocks(data, row, tokenizer, recipe)]
    return html_page.page(str(line["id"]), out)


def _block(block: Block) -> str:
    texts = (f"<mark>{t}</mark>" if m else t for t, m in ((html.escape(visible(t)), m) for t, m, _ in block.pieces))
    opened = " open" if block.supervised or sum(n for *_, n in block.pieces) < _OPEN else ""
    return f"<details{opened}><summary class=sub>{html.escape(block.heading)}</summary><pre>{''.join(texts)}</pre></details>"
