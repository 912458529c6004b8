"""Source `openai`: chat-completion messages as most tools and servers write them, as JSON Lines or one JSON array.

A record is `{id?, messages, tools}`, and any other column. `data_prep/normalise/record.py` lists what is mended.
"""

from typing import Any

from data_prep.records import json_records

records = json_records


def convert(record: dict[str, Any], repairs: list[str]) -> dict[str, Any]:
    """Return the record: its names are the project's own."""
    return record
