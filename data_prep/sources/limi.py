"""Source `limi`: GAIR/LIMI as published, and other data in its schema, as JSON Lines or one JSON array.

A record is `{id?, messages, tools}` with arguments as objects. What Arrow filled with null is taken out by
`data_prep/normalise/null_filling.py`, as for every source.
"""

from data_prep.sources.openai import convert, records

__all__ = ["convert", "records"]
