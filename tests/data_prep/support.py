"""What tests of the data stage share: the official templates, records, and the proof and the turns written a second time,
apart from the code under test."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from data_prep.text.chat import Chat
from data_prep.text.sequences import Encoded
from data_prep.text.tokenizer import load_tokenizer
from data_prep.trajectory import Message, Trajectory, validate
from recipes.config import Family

OFFICIAL = {
    "glm4.5": ("glm45_standin_hf", Family["glm4_moe"], "GLM-4.5.jinja"),
    "qwen3": ("qwen3_hf", Family["qwen3"], "Qwen3.jinja"),
    "qwen3-2507": ("qwen3_hf", Family["qwen3"], "Qwen3-Instruct-2507.jinja"),
}


@cache
def official(reference: Path, name: str) -> Chat:
    """The official template over its tokenizer (GLM's is a stand-in with its special tokens). Shared: not to be changed."""
    folder, family, template = OFFICIAL[name]
    tokenizer = load_tokenizer(reference / "tokenizers" / folder)
    tokenizer.chat_template = (reference / "templates" / template).read_text()
    return Chat(tokenizer, family)


def call(identity: str, name: str = "f", **arguments: Any) -> dict[str, Any]:
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(identity: str, content: str = "ok", **more: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": identity, "content": content, **more}


def user(content: str = "go") -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str = "", *calls: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **({"tool_calls": [*calls]} if calls else {}), **more}


TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


def conversation(*messages: dict[str, Any], tools: list[dict[str, Any]] | None = None) -> Trajectory:
    return validate({"id": "x", "messages": [*messages], "tools": [TOOL] if tools is None else tools})


def assert_proved(chat: Chat, trajectory: Trajectory, encoded: list[Encoded], supervised: list[int]) -> None:
    """Every turn once, after exactly the tokens that transformers' own `apply_chat_template` gives for its prompt."""
    assert [t.message for e in encoded for t in e.turns] == supervised
    for e in encoded:
        for t in e.turns:
            prompt = chat.tokenizer.apply_chat_template(
                trajectory.chat()[: t.message], tools=[*trajectory.tools] or None, add_generation_prompt=True,
                return_dict=False,
            )  # fmt: skip
            assert e.tokens[: t.prompt].tolist() == prompt
            assert t.prompt <= t.start < t.end
        assert e.turns[-1].end == len(e.tokens)


def spoken(name: str, message: Message) -> str:
    """An assistant turn as its family writes it, from after the prompt through the stop token, by hand."""
    reasoning, content = message.reasoning_content or "", message.content
    calls = [c.function for c in message.tool_calls or []]
    if name == "glm4.5":
        text = f"\n<think>{reasoning.strip()}</think>" + (f"\n{content.strip()}" if content.strip() else "")
        for c in calls:
            pairs = "".join(
                f"<arg_key>{k}</arg_key>\n<arg_value>{v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)}</arg_value>\n"
                for k, v in c.arguments.items()
            )
            text += f"\n<tool_call>{c.name}\n{pairs}</tool_call>"
        return text + ("<|observation|>" if calls else "<|user|>")
    newline = bool(content)
    if reasoning.strip():
        reasoning = reasoning.strip("\n")
        content = f"<think>\n{reasoning}\n</think>\n\n" + content.lstrip("\n")
    for i, c in enumerate(calls):
        arguments = json.dumps(c.arguments, ensure_ascii=False)
        gap = "\n" if i or newline else ""
        content += f'{gap}<tool_call>\n{{"name": "{c.name}", "arguments": {arguments}}}\n</tool_call>'
    return content + "<|im_end|>"
