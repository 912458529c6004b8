"""Checks of a model's answers: it calls tools, stops, uses known tools with valid arguments, and keeps to its format."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from jsonschema import Draft202012Validator

from launch.checks import Check, judged, share
from launch.sanity.behaviour.turns import WITHIN, Answer
from recipes.config import Family
from recipes.families import facts

_MARKS = (
    "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
    "<|endoftext|>",
)  # fmt: skip
_WITH_CJK = ("HIRAGANA", "KATAKANA")  # scripts that one text mixes with CJK characters, so they count as CJK
_LEAST_LETTERS = 12  # fewest letters needed to determine a script
_TIMES = 4  # a text's end is a repetition if a unit occurs at least this often in a row,
_LEAST_REPEATED = 60  # and the repeated part has at least this many characters
_MORE_CALLS = 2  # limit of calls in a turn, as a multiple of the largest recorded number


def right_calls(name: str, answers: Sequence[Answer], least: float | None) -> Check:
    """Check the share of prompts answered with exactly the trajectory's calls: the same names and arguments.

    An answer that exceeds its token limit counts as wrong. least: the lowest share that passes; None judges none.
    """
    asked = [a for a in answers if a.turn.expected]
    wrong = [str(a) for a in asked if not a.right]
    return share(name, "an agent that does not act", len(asked) - len(wrong), len(asked), least, wrong[:1], WITHIN)


def beside_base(before: Sequence[Answer], after: Sequence[Answer], of: int) -> Check:
    """Compare the base's answers to a sample of prompts with the trained model's answers to the same prompts.

    before: the base's answers. after: the trained model's answers. of: the number of prompts that the sample is drawn from.
    """
    asked = {id(a.turn) for a in before}
    same = [a.right for a in after if id(a.turn) in asked]
    shown = right_calls("the base on trained prompts", before, None)
    figure = f"{shown.figure}, the trained model {sum(same)} of {len(same)}" if same else shown.figure
    sample = f"{len(before)} of the {of} prompts, drawn with the seed: enough to show what training changed"
    return replace(shown, figure=figure, detail=f"{sample}. {shown.detail}".strip())


def stops(answers: Sequence[Answer], least: float) -> Check:
    """Check that answers end with a stop token before their token limit."""
    endless = [str(a) for a in answers if not a.stopped]
    return share("stop token", "an agent that runs on after its call", len(answers) - len(endless), len(answers), least,
                 endless[:1], WITHIN)  # fmt: skip


def bursts(name: str, counts: Iterable[tuple[int, object]], recorded: Sequence[int]) -> Check:
    """Check the number of calls in a turn.

    counts: (number of calls, what to show of the turn), for each turn with calls. recorded: numbers of calls in the data's turns.
    """
    called = list(counts)
    limit = _MORE_CALLS * max(recorded, default=1)
    most, where = max(called, key=lambda c: c[0], default=(0, None))
    mean = sum(n for n, _ in called) / max(1, len(called))
    of_record = (
        f"recorded {sum(recorded) / len(recorded):.2f}, at most {max(recorded)}" if recorded else "none recorded"
    )
    return Check(
        name, "an agent that calls in bursts", f"{mean:.2f}, at most {most}; {of_record}",
        f"at most {limit}", judged(most <= limit), str(where) if most > limit else "",
    )  # fmt: skip


def valid_calls(answers: Sequence[Answer], least: float) -> Check:
    """Check that each call names a known tool, and that its arguments parse as JSON and match the tool's schema."""
    seen, faults = 0, []
    for a in answers:
        schemas = {t["function"]["name"]: t["function"].get("parameters") or {} for t in a.turn.conversation["tools"]}
        for name, arguments in a.calls:
            seen += 1
            if name not in schemas:
                faults.append(f"{a.turn}: {name} is not one of the tools {', '.join(schemas)}")
            elif not isinstance(arguments, dict):
                faults.append(f"{a.turn}: arguments of {name} are not a JSON object: {arguments!r}")
            elif error := next(Draft202012Validator(schemas[name]).iter_errors(arguments), None):
                faults.append(f"{a.turn}: {name}: {error.message}")
    return share("calls match their schema", "calls that a tool refuses", seen - len(faults), seen, least, faults)


def leaks(answers: Sequence[Answer], family: Family, least: float) -> Check:
    """Check that text shown to users contains no marks of calls, thinking or roles."""
    known = facts(family).chat
    marks = {*_MARKS, *known.think, *known.roles, *known.stops}
    found = [
        f"{a.turn}: {mark} in {text[:200]!r}"
        for a in answers
        for text in (a.content, a.reasoning)
        if (mark := next((m for m in sorted(marks) if m in text), None))
    ]
    return share("no marks in text", "calls and thinking that a client shows as text", len(answers) - len(found), len(answers),
                 least, found)  # fmt: skip


def separated(answers: Sequence[Answer]) -> Check:
    """Check that the server puts thinking in `reasoning_content` and the reply in `content`.

    Only answers whose text equals that of the recorded turn are judged, because only for these is the right split known.
    """
    seen, misplaced = 0, []
    for a in answers:
        thought, words = (a.turn.message.get(key, "").strip() for key in ("reasoning_content", "content"))
        said = a.reasoning, a.content
        if not (thought or words) or "".join(said) != thought + words:
            continue
        seen += 1
        if said != (thought, words):
            misplaced.append(f"{a.turn}: the server returns thinking {said[0][:80]!r} and content {said[1][:80]!r}")
    fix = "serve a model that does not think without --reasoning-parser, as make serve does, or ask with separate_reasoning=false"
    protects_from = "a reply that a client hides as thinking, or thinking that it shows"
    faults = [*misplaced[:1], *([fix] if misplaced else [])]
    return share("thinking apart", protects_from, seen - len(misplaced), seen, 1, faults)


def repetition(answers: Sequence[Answer], least: float) -> Check:
    """Check that no answer ends in the same text several times in a row."""
    found = [f"{a.turn}: it ends by repeating {unit!r}" for a in answers if (unit := repeated(a.reasoning + a.content))]
    return share("no repetition", "an agent caught in a loop", len(answers) - len(found), len(answers), least, found)


def repeated(text: str) -> str | None:
    """Return the shortest unit that a text's end repeats: at least 4 times in a row and over at least 60 characters, or None."""
    for size in range(1, len(text) // _TIMES + 1):
        times = max(_TIMES, -(-_LEAST_REPEATED // size))
        unit = text[-size:]
        if times * size <= len(text) and text.endswith(unit * times) and not unit.isspace():
            return unit
    return None


def language(answers: Sequence[Answer], least: float) -> Check:
    """Check that an answer's main script also occurs in its conversation, up to and including the recorded turn."""
    seen, changed = 0, []
    for a in answers:
        answered = script(a.content + a.reasoning)
        before = a.turn.conversation["messages"][: a.turn.index + 1]
        texts = [str(m.get(key) or "") for m in before for key in ("content", "reasoning_content")]
        recorded = {script(text) for text in texts} - {None}
        if answered is None or not recorded:
            continue
        seen += 1
        if answered not in recorded:
            changed.append(f"{a.turn}: {answered}, but the conversation is {', '.join(sorted(map(str, recorded)))}")
    return share("same language", "an agent that changes its language", seen - len(changed), seen, least, changed)


def script(text: str) -> str | None:
    """Return the script of most letters (LATIN, CJK, CYRILLIC …), or None if there are too few letters to tell."""
    letters = re.findall(r"[^\W\d_]", text)
    names = (unicodedata.name(letter, "?").split()[0] for letter in letters)
    kinds = Counter("CJK" if name in _WITH_CJK else name for name in names)
    return kinds.most_common(1)[0][0] if len(letters) >= _LEAST_LETTERS else None


def all_checks(answers: Sequence[Answer], family: Family, least: float) -> list[Check]:
    """Return the checks that apply to every answer: greedy or sampled, on trained or held-out prompts.

    least: the lowest share of answers that must pass each check.
    """
    recorded = [len(a.turn.expected) for a in answers if a.turn.expected]
    return [
        stops(answers, least),
        bursts("calls per turn", ((len(a.calls), a) for a in answers if a.calls), recorded),
        valid_calls(answers, least),
        leaks(answers, family, least),
        separated(answers),
        repetition(answers, least),
        language(answers, least),
    ]
