"""Source `limi`: GAIR/LIMI as published, and other data in its schema, as JSON Lines or one JSON array.

A record is `{id?, messages, tools}` with arguments as objects. What Arrow filled with null is taken out by
`data_prep/normalise/null_filling.py`, as for every source.
"""

from typing import Any

from data_prep.records import json_records

records = json_records


def convert(record: dict[str, Any], repairs: list[str]) -> dict[str, Any]:
    """Return the record: its names are the project's own."""
    return record
