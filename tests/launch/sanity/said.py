"""Turns and answers that the tests of behaviour judge."""

import numpy as np

from launch.checks import Outcome
from launch.sanity.behaviour.turns import Answer, Turn

READ = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
TOOLS = [{"type": "function", "function": {"name": "read", "parameters": READ}}]
PLAN = ("read", {"path": "plan.txt"})


def turn(
    *calls, content="I read it.", thinking="", request="Read the file plan.txt and say what it says.", tools=TOOLS
):
    said = {"role": "assistant", "content": content}
    if calls:
        said["tool_calls"] = [{"function": {"name": n, "arguments": a}} for n, a in calls]
    if thinking:
        said["reasoning_content"] = thinking
    messages = [{"role": "user", "content": request}, said]
    return Turn({"id": "abc", "messages": messages, "tools": tools}, 1, np.array([1, 2, 3, 4, 5]), 3)


def of(asked, **more):
    """An answer that says what the record says, but for what is named."""
    same = {
        "finish_reason": "stop", "content": asked.message["content"], "calls": asked.expected, "prompt": asked.prompt,
        "reasoning": asked.message.get("reasoning_content", ""),
    }  # fmt: skip
    return Answer(asked, **same | more)


def fails(check, name, says):
    assert (check.name, check.outcome) == (name, Outcome.failed)
    assert says in check.detail
    return True
