"""Golden texts: every row of the templates' differences, for every family.

`golden/CASE.json` is a record with its source and options, `golden/CASE.FAMILY.txt` what becomes of it: its sequences,
supervised text in ⟦brackets⟧, or the reason of its refusal. After a change that is meant to change them:
`LIMI_REFERENCE=FOLDER python -m tests.data_prep.test_golden` writes the texts anew, to be read before they are committed.
"""

import json
import os
from pathlib import Path

import pytest

from data_prep.pack import trajectory_options
from data_prep.records import Record
from data_prep.sources import read_trajectory, source
from data_prep.text.chat import Chat
from data_prep.trajectory import Rejected
from recipes.config import Data, SpecialTokens, Thinking
from tests.data_prep.support import OFFICIAL, assert_proved, official

FOLDER = Path(__file__).parent / "golden"
CASES = sorted(p.stem for p in FOLDER.glob("*.json"))


def text_of(chat: Chat, case: str) -> str:
    """The annotated sequences of a case; every one is proved by transformers' own render as well."""
    given = json.loads((FOLDER / f"{case}.json").read_text())
    chosen = Data(
        thinking=Thinking(given["options"].get("thinking", "supervise")),
        special_tokens=SpecialTokens(given["options"].get("special_tokens", "reject")),
    )
    try:
        said = read_trajectory(Record("", json.dumps(given["record"]).encode(), 0), source(given["source"]))
        said = trajectory_options.without_special_tokens(
            trajectory_options.without_thinking(said, chosen), chat.special, chosen
        )
        turns, *_ = trajectory_options.supervised(said, chosen)
        encoded = chat.encode(said, turns, chosen.thinking)
    except Rejected as error:
        return f"rejected: {error.code.value}: {error}\n"
    assert_proved(chat, said, encoded, turns)
    out = []
    for number, e in enumerate(encoded):
        out.append(f"=== sequence {number}, {e.begins}\n")
        at = 0
        for t in e.turns:
            out += [
                chat.tokenizer.decode(e.tokens[at : t.start]),
                "⟦",
                chat.tokenizer.decode(e.tokens[t.start : t.end]),
                "⟧",
            ]
            at = t.end
        out.append("\n")
    return "".join(out)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", OFFICIAL)
def test_the_text_is_the_golden_one(reference, family, case):
    golden = (FOLDER / f"{case}.{family}.txt").read_text(encoding="utf-8")
    assert text_of(official(reference, family), case) == golden


def test_no_golden_text_is_left_over():
    assert {p.name for p in FOLDER.glob("*.txt")} == {f"{case}.{family}.txt" for case in CASES for family in OFFICIAL}


if __name__ == "__main__":
    for family in OFFICIAL:
        chat = official(Path(os.environ["LIMI_REFERENCE"]), family)
        for case in CASES:
            (FOLDER / f"{case}.{family}.txt").write_text(text_of(chat, case), encoding="utf-8")
