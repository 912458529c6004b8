"""What other tools call a field of a message or of a call, and what becomes of it here."""

from typing import Any

from data_prep.trajectory import Code, Rejected

MESSAGE = (
    "role",
    "content",
    "reasoning_content",
    "tool_calls",
    "tool_call_id",
    "name",
    "weight",
    "unsupervised",
    "is_error",
)

# Names of reasoning, of calls and of what a turn counts, in the words of this project.
REASONING = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
DETAILS = ("reasoning_details", "thinking_blocks")  # lists of thoughts, which may be encrypted or repeat the reasoning
LEARNED = ("weight", "train", "trainable", "loss", "loss_mask", "loss_weight", "supervise", "learn")
# Fields that say nothing about the text: about the request, the server, the interface or the bookkeeping.
SILENT = frozenset(
    (
        "agent", "agent_id", "annotations", "cache_control", "citations", "completion_tokens", "cost", "created",
        "created_at", "duration", "duration_ms", "extra", "finish_reason", "id", "index", "is_demo", "latency", "logprobs",
        "message_id", "message_type", "metadata", "model", "object", "parent_id", "parentUuid", "parent_uuid",
        "prompt_tokens", "provider", "provider_specific_fields", "raw", "request_id", "response_id", "session_id",
        "signature", "status", "stop_reason", "stop_sequence", "system_fingerprint", "thinking_signature",
        "time", "timestamp", "token_ids", "tool_name", "turn", "turn_id", "type", "usage", "uuid", "version",
    )
)  # fmt: skip
# Fields that say something that no chat template can render as it is.
_SAYS = {
    "audio": "leave the record out: this project trains on text",
    "refusal": "write its text as content if the model is to learn it, or leave the record out",
    "images": "leave the record out: this project trains on text",
    "image": "leave the record out: this project trains on text",
    "videos": "leave the record out: this project trains on text",
    "files": "write their text as content where the model saw it",
    "attachments": "write their text as content where the model saw it",
    "history": "write it as messages",
    "tools": "write it beside messages, once for the record",
    "prefix": "write it at the start of content",
    "observation": "write it as a message of role tool",
    "action": "write it as tool_calls",
    "response": "write it as content and tool_calls",
    "query": "write it as content",
    "text": "write it as content",
    "value": "write it as content, and from as role",
    "from": "write it as role, and value as content",
    "parts": "write role and content: this is Gemini's form of a message",
    "message": "a Claude Code session or another log: its messages are inside",
    "events": "an event log: take data=requests if it is SII-CLI's",
}


def sorted_out(message: dict[str, Any], number: int, repairs: list[str]) -> dict[str, Any]:
    """Return the message's own fields, without those that are empty or say nothing about the text; `repairs` names the latter.

    Raise `Rejected` for a field that says something else, with what to write instead.
    """
    own: dict[str, Any] = {}
    silent = []
    for name, value in message.items():
        if name in MESSAGE or name in REASONING or name in LEARNED or name in (*DETAILS, "function_call"):
            own[name] = value
        elif value in (None, "", [], {}):
            continue
        elif name in SILENT:
            silent.append(name)
        elif name in _SAYS:
            raise Rejected(Code.shape, f"message {number} has {name}, which is no field of a message here", _SAYS[name])
        else:
            raise Rejected(
                Code.shape,
                f"message {number} has the field '{name}', which is not known here; a message has {', '.join(MESSAGE)}",
                "if it holds text that the model saw or said, write it in content; if not, write it beside messages, where it is "
                "kept as metadata",
            )
    if silent:
        repairs.append(f"message {number}: {', '.join(sorted(silent))} left out, which no template shows")
    return own


def weight(own: dict[str, Any], number: int, repairs: list[str]) -> int | None:
    """Return whether the turn is learned, 1 or 0, by whatever name it is said; None if nothing says so. `own` loses the names."""
    said = {name: own.pop(name) for name in LEARNED if name in own}
    said = {name: value for name, value in said.items() if value is not None}
    if not said:
        return None
    values = {}
    for name, value in said.items():
        if value not in (0, 1):  # True and False are 1 and 0
            raise Rejected(
                Code.shape, f"message {number}: {name} is {value!r}", "write weight 1 for a turn to learn, or weight 0"
            )
        values[name] = int(value)
    if len(set(values.values())) > 1:
        raise Rejected(Code.shape, f"message {number}: {', '.join(said)} contradict each other", "write weight alone")
    learned = next(iter(values.values()))
    if (role := own.get("role")) != "assistant" and not learned:
        repairs.append(f"message {number}: {', '.join(said)} left out: turns of the assistant alone are learned")
        return None
    if role != "assistant":
        raise Rejected(
            Code.shape,
            f"message {number}: {', '.join(said)} stands at a message of role {role}, and turns of the assistant alone are learned",
            "leave it out there",
        )
    if names := [name for name in said if name != "weight"]:
        repairs.append(f"message {number}: {', '.join(names)} read as weight {learned}")
    return learned
