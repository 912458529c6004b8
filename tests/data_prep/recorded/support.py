"""Logs of recorded calls, as files."""

import json
import tempfile
from pathlib import Path

from data_prep.sources import read_trajectory, source


def conversations(*lines, name="s1.jsonl", folder=None):
    """The trajectories of a log with these lines."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(folder or scratch) / name
        if lines:
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        module = source("requests")
        return [read_trajectory(record, module) for record in module.records(path if lines else Path(folder))]


def logged(record):
    """The one trajectory of an event log."""
    (one,) = conversations(record, name="s1.json")
    return one


def request(*contents, system="be good", tools=None):
    declared = {
        "name": "f",
        "description": "d",
        "parameters": {"type": "OBJECT", "properties": {"a": {"type": "STRING"}}},
    }
    full = {
        "system_instruction": system,
        "tools": tools or [{"functionDeclarations": [declared]}],
        "messages": [*contents],
    }
    return {"type": "api_request_full", "data": {"full_request": full}}


def answer(*parts):
    return {
        "type": "api_response_full",
        "data": {"full_response": {"candidates": [{"content": {"role": "model", "parts": [*parts]}}]}},
    }


def content(role, *parts):
    return {"role": role, "parts": [*parts]}


def text(value, **more):
    return {"text": value, **more}


def called(identity, **arguments):
    return {
        "functionCall": {"id": identity, "name": "f", "args": arguments}
        if identity
        else {"name": "f", "args": arguments}
    }


def response(identity, value):
    return {
        "functionResponse": {"id": identity, "name": "f", "response": value}
        if identity
        else {"name": "f", "response": value}
    }


def log(*events):
    return {"id": "s1", "model": "m", "created": "now", "events": [{"type": "telemetry"}, *events]}
