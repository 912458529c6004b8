"""Source `trajectory`: the project's own form, `data_prep/trajectory.py`, which every stage that writes trajectories writes.

A record is `{id, messages, tools, metadata?}`, as JSON Lines, a JSON array or Parquet. Another column is refused: it would be lost
from one stage to the next.
"""

from typing import Any

from data_prep.records import json_records
from data_prep.trajectory import Code, Rejected

records = json_records
_COLUMNS = ("id", "messages", "tools", "metadata")


def convert(record: dict[str, Any], repairs: list[str]) -> dict[str, Any]:
    """Return the record. Raise `Rejected` for a column that is not its own."""
    if others := sorted(record.keys() - {*_COLUMNS}):
        raise Rejected(
            Code.shape,
            f"a trajectory has {', '.join(_COLUMNS)}, and this record has {', '.join(others)}",
            "write them inside metadata, or data=openai, which reads other forms",
        )
    return record
