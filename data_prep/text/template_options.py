"""Options of a chat template, `model.template_options`, as data and server tell them to it. In a file of its own: the server's command
line needs no tokenizer."""

import json
from collections.abc import Mapping
from typing import Any

OWN = ("messages", "tools", "documents", "add_generation_prompt")  # what a server itself tells the template


def option_values(options: Mapping[str, str]) -> dict[str, Any]:
    """Return `model.template_options` with true, false, null and numbers as such, and any other value as text."""
    values: dict[str, Any] = {}
    for name, text in options.items():
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    return values
