"""Tools in the forms that people have, as OpenAI's function tools, with the keys that the server passes on to the template."""

from typing import Any

from data_prep.normalise.calls import from_text
from data_prep.normalise.null_filling import without_nulls
from data_prep.trajectory import Code, Rejected

_TOOL = ("type", "function", "defer_loading")
_FUNCTION = ("name", "description", "parameters", "strict", "defer_loading")
_ADDED = ("description", "parameters")


def normal_tools(
    tools: Any, functions: Any, messages: list[dict[str, Any]], repairs: list[str]
) -> list[dict[str, Any]]:
    """Return the tools as `{type: function, function: {name, …}}` without null keywords. functions: OpenAI's older form.

    A tool that a server runs itself, such as a web search, is left out if no message calls it.
    """
    found = [*_listed(tools, "tools", repairs)]
    found += [{"type": "function", "function": f} for f in _listed(functions, "functions", repairs)]
    out = []
    for number, tool in enumerate(found):
        removed: list[str] = []
        cleaned = without_nulls(_without_absent(tool), "", removed)
        repairs.extend(f"null {path} removed from the tools" for path in removed)
        if (normal := _tool(cleaned, number, messages, repairs)) is not None:
            out.append(_as_served(normal, number, repairs))
    return out


def _without_absent(tool: dict[str, Any]) -> dict[str, Any]:
    """Return the tool without the null keys that the server adds anyway."""
    out = {k: v for k, v in tool.items() if k != "defer_loading" or v is not None}
    function = out.get("function")
    if isinstance(function, dict):
        out["function"] = {k: v for k, v in function.items() if v is not None or k not in _ADDED}
    return out


def _as_served(tool: dict[str, Any], number: int, repairs: list[str]) -> dict[str, Any]:
    """Return the tool as SGLang 0.5.23 hands it to the template (`openai/protocol.py`, Tool and Function).

    It has the keys that SGLang knows, those of the function in the order of the record, and null for a description, parameters and the
    tool's defer_loading that are missing.
    """
    function = tool.get("function")
    if not isinstance(function, dict):
        return tool  # which `trajectory.py` refuses by name
    unknown = [k for k in tool if k not in _TOOL] + [k for k in function if k not in _FUNCTION]
    if unknown:
        repairs.append(f"tool {number}: {', '.join(unknown)} left out, which the server does not pass on")
    deferred = tool.get("defer_loading")
    kept = {k: v for k, v in function.items() if k in _FUNCTION}
    kept |= {k: None for k in _ADDED if k not in kept}
    if deferred is not None:
        kept.setdefault("defer_loading", deferred)
    return {"type": tool.get("type"), "function": kept, "defer_loading": deferred}


def schemas_of(tools: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the parameters' schema of every tool by its name."""
    functions = (tool.get("function") for tool in tools)
    return {str(f.get("name")): f.get("parameters") for f in functions if isinstance(f, dict)}


def _listed(value: Any, what: str, repairs: list[str]) -> list[dict[str, Any]]:
    value = from_text(value, what, repairs)
    if value in (None, ""):
        return []
    if not isinstance(value, list):
        raise Rejected(Code.shape, f"{what} must be a list of objects, this is {str(value)[:80]}")
    value = [from_text(one, f"an entry of {what}", repairs) for one in value]
    if not all(isinstance(one, dict) for one in value):
        raise Rejected(Code.shape, f"{what} must be a list of objects, this is {str(value)[:80]}")
    return value


def _tool(
    tool: dict[str, Any], number: int, messages: list[dict[str, Any]], repairs: list[str]
) -> dict[str, Any] | None:
    if "function" in tool:
        if isinstance(tool["function"], dict) and "parameters" in tool["function"]:
            name = tool["function"].get("name")
            parameters = from_text(tool["function"]["parameters"], f"parameters of tool '{name}'", repairs)
            return {**tool, "function": {**tool["function"], "parameters": parameters}}
        return tool
    if "name" not in tool:
        if tool.get("type") in (None, "function"):
            return tool  # which `trajectory.py` refuses by name
        called = {c.get("function", {}).get("name") for m in messages for c in _calls(m)}
        if tool["type"] in called:
            return tool
        repairs.append(f"tool {number}: '{tool['type']}' left out: a server runs it itself, and nothing calls it")
        return None
    function = {k: v for k, v in tool.items() if k not in ("type", "input_schema", "cache_control")}
    form = "flat"
    if "input_schema" in tool:
        function["parameters"], form = tool["input_schema"], "Anthropic's"
    repairs.append(f"tool '{tool['name']}': {form} form read as a function tool")
    return {"type": "function", "function": function}


def _calls(message: dict[str, Any]) -> list[dict[str, Any]]:
    calls = message.get("tool_calls")
    return (
        [c for c in calls if isinstance(c, dict) and isinstance(c.get("function"), dict)]
        if isinstance(calls, list)
        else []
    )
