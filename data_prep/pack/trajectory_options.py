"""Apply the recipe's data options to a trajectory before encoding."""

from data_prep.trajectory import Code, Rejected, Trajectory
from recipes.config import Data, ErroneousCalls, SchemaBreaks, SpecialTokens, Thinking, Turns


def without_thinking(trajectory: Trajectory, options: Data) -> Trajectory:
    """Return the trajectory without blank reasoning; with `data.thinking=drop`, without any. `repairs` lists the removal."""
    dropped = [
        m.reasoning_content is not None and (options.thinking is Thinking.drop or not m.reasoning_content.strip())
        for m in trajectory.messages
    ]
    if not any(dropped):
        return trajectory
    messages = [
        m.model_copy(update={"reasoning_content": None}) if drop else m
        for m, drop in zip(trajectory.messages, dropped, strict=True)
    ]
    what = "reasoning" if options.thinking is Thinking.drop else "blank reasoning"
    repairs = [*trajectory.repairs, f"{what} of {sum(dropped)} messages left out"]
    return trajectory.model_copy(update={"messages": messages, "repairs": repairs})


def without_special_tokens(trajectory: Trajectory, special: list[str], options: Data) -> Trajectory:
    """Return the trajectory with the tokenizer's special tokens escaped in its texts and listed in `repairs`.

    Raise `Rejected` instead if `data.special_tokens=reject`. In content these texts would become control tokens, in
    training and at inference. special: the tokens, longest first.
    """
    all_text = "\n".join(trajectory.texts())
    found = [token for token in special if token in all_text]
    if not found:
        return trajectory
    if options.special_tokens is SpecialTokens.reject:
        where = next(
            (f"message {k}" for k, m in enumerate(trajectory.messages) if found[0] in m.model_dump_json()), "a tool"
        )
        raise Rejected(
            Code.special_token,
            f"{where} holds the special token {found[0]} as text, which would become a control token"
            f"{' (also in the record: ' + ', '.join(found[1:]) + ')' if found[1:] else ''}",
            f"write data.special_tokens=escape to have '{_escaped(found[0])}' instead",
        )

    def escape(text: str) -> str:
        for token in found:
            text = text.replace(token, _escaped(token))
        return text

    escaped = trajectory.map_texts(escape)
    left = next((token for token in special for text in escaped.texts() if token in text), None)
    if left:
        raise Rejected(
            Code.special_token,
            f"escaping {', '.join(found)} leaves the special token {left}",
            "remove it from the data",
        )
    return escaped.model_copy(update={"repairs": [*trajectory.repairs, f"escaped {', '.join(found)}"]})


def _escaped(token: str) -> str:
    return f"{token[0]} {token[1:]}"


def supervised(trajectory: Trajectory, options: Data) -> tuple[list[int], int, list[str]]:
    """Return (indices of the assistant messages to supervise, number of calls that break their tool's schema, what is not learned).

    Raise `Rejected` if no message is left, or if a call breaks its schema and `data.schema_breaks=reject`.
    """
    messages = trajectory.messages
    faults = list(trajectory.faulty_calls())
    if faults and options.schema_breaks is SchemaBreaks.reject:
        raise Rejected(
            Code.schema,
            f"message {faults[0][0]}: {faults[0][1]} ({len(faults)} such calls)",
            "write data.schema_breaks=accept to keep it"
            if trajectory.tools
            else "the record has no tools: write data.tools=FILE of those that were sent, or data.schema_breaks=accept",
        )
    turns, notes = [], []
    opened = next((k for k, m in enumerate(messages) if m.role in ("user", "tool")), len(messages))
    for k in trajectory.assistant_turns():
        m = messages[k]
        if m.weight == 0:
            continue
        if k < opened:
            notes.append(f"message {k} opens the conversation: shown, not learned")
        elif not (m.content.strip() or m.tool_calls or (m.reasoning_content or "").strip()):
            notes.append(f"message {k} says nothing: shown, not learned")
        else:
            turns.append(k)
    if options.turns is Turns.last_segment:
        last_user = max((k for k, m in enumerate(messages) if m.role == "user"), default=-1)
        turns = [k for k in turns if k > last_user]
    if options.erroneous_calls is ErroneousCalls.mask:
        failed = {m.tool_call_id for m in messages if m.is_error}
        wrong = {k for k, _ in faults}
        turns = [k for k in turns if k not in wrong and not any(c.id in failed for c in messages[k].tool_calls or [])]
    if not turns:
        raise Rejected(
            Code.no_supervised, "no assistant turn is left to supervise", "see data.turns and data.erroneous_calls"
        )
    return turns, len(faults), notes


def pieces(trajectory: Trajectory) -> list[list[int]]:
    """Return the message indices of every piece that `data.too_long=split` may cut.

    A piece is a user message with everything up to the next one. If no assistant answers, it also includes the next user
    message. Leading system messages belong to all pieces and are not listed.
    """
    cut: list[list[int]] = []
    for k, m in enumerate(trajectory.messages):
        if m.role == "system" and not cut:
            continue
        answered = bool(cut) and any(trajectory.messages[i].role == "assistant" for i in cut[-1])
        if not cut or (m.role == "user" and answered):
            cut.append([])
        cut[-1].append(k)
    return cut
