"""How records are read: what the recipe and the model's template say to it."""

from dataclasses import dataclass, field

from data_prep.given import Given
from data_prep.normalise.record import Joins
from recipes.config import BrokenCalls, Columns, OpenCalls

SERVER = "SGLang 0.5.23"  # whose reading of requests the text follows; `tests/data_prep/test_wire.py` runs it


@dataclass(frozen=True)
class Reading:
    """joins: how text parts become one text. columns: where a record has messages and tools. given: tools and system prompt of
    records without."""

    joins: Joins = field(default_factory=Joins)
    columns: Columns = field(default_factory=Columns)
    given: Given = field(default_factory=Given)
    broken_calls: BrokenCalls = BrokenCalls.reject
    open_calls: OpenCalls = OpenCalls.reject
