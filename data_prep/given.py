"""Tools and a system prompt from files, for records that have none: `data.tools=FILE data.system=FILE`.

Sessions of Claude Code and many published data sets leave out what was sent with every request. It belongs into the training text.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.records import parse
from data_prep.trajectory import Code, Rejected
from recipes.config import Data
from recipes.errors import DataError

GIVEN = ("tools", "system")  # options that name a file


@dataclass(frozen=True)
class Given:
    """What the files say. tools: in any form that `normalise/tool_forms.py` reads."""

    tools: Any = None
    system: str | None = None

    @classmethod
    def read(cls, data: Data) -> "Given":
        """Read the files that the options name. Raise `DataError` for a file that is missing or of another kind."""
        tools = system = None
        if data.tools:
            path = given_file(data.tools, "tools")
            try:
                tools = parse(path.read_bytes())
            except Rejected as error:
                raise DataError(f"data.tools={path}: {error.problem}", "write a JSON list of tools") from error
            tools = tools.get("tools") if isinstance(tools, dict) else tools
            if not isinstance(tools, list) or not tools:
                raise DataError(
                    f"data.tools={path} holds no list of tools", "write a JSON list, or a request with tools"
                )
        if data.system:
            path = given_file(data.system, "system")
            try:
                system = path.read_text(encoding="utf-8").rstrip("\n")
            except UnicodeDecodeError as error:
                raise DataError(f"data.system={path} is not UTF-8 text", "write a text file") from error
        return cls(tools, system)

    def completed(self, record: dict[str, Any], repairs: list[str]) -> dict[str, Any]:
        """Return the record with what it lacks, and append what was given to `repairs`."""
        out = dict(record)
        metadata = record.get("metadata")
        if (
            isinstance(metadata, dict)
            and metadata.get("sidechain")
            and (self.tools is not None or self.system is not None)
        ):
            raise Rejected(
                Code.tool,
                "a sub-agent has tools and a system prompt of its own, which neither the session nor data.tools and data.system hold",
                "keep sub-agents out of data.path, or write data.max_rejected=N",
            )
        if self.tools is not None and not (record.get("tools") or record.get("functions")):
            out["tools"] = self.tools
            repairs.append("tools of data.tools")
        messages = record.get("messages")
        if self.system is not None and isinstance(messages, list) and not _has_system(messages):
            out["messages"] = [{"role": "system", "content": self.system}, *messages]
            repairs.append("system prompt of data.system")
        return out


def given_file(path: str, option: str) -> Path:
    """Return the file that an option names. Raise `DataError` if it is missing."""
    if not Path(path).is_file():
        raise DataError(f"data.{option}={path}: no such file", f"write data.{option}=FILE")
    return Path(path)


def _has_system(messages: list[Any]) -> bool:
    return bool(messages) and isinstance(messages[0], dict) and messages[0].get("role") in ("system", "developer")
