"""The proof from the wire on: SGLang's own request processing makes of what a client sends exactly our prompts."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from data_prep.normalise.record import Joins
from data_prep.pack import trajectory_options
from data_prep.reading import SERVER, Reading
from data_prep.records import Record
from data_prep.sources import read_trajectory, source
from data_prep.trajectory import Rejected
from launch.serving.sglang_command import STAND_INS
from recipes.config import Data, SchemaBreaks, SpecialTokens
from tests.data_prep.support import OFFICIAL, official
from tests.data_prep.test_cases import FOLDER as CASES
from tests.data_prep.test_cases import KEPT, KINDS
from tests.data_prep.test_golden import CASES as GOLDEN
from tests.data_prep.test_golden import FOLDER as GOLDEN_FOLDER

PARSERS = {"glm4.5": "glm45", "qwen3": "qwen25", "qwen3-2507": "qwen25"}
CHOSEN = Data(schema_breaks=SchemaBreaks.accept, special_tokens=SpecialTokens.escape)


def records():
    """The records of all cases that are kept, and of all golden files: name, source, raw record."""
    for name in KEPT:
        (path,) = CASES.glob(f"{name}.*")
        kind = KINDS.get(name, "openai")
        for number, record in enumerate(source(kind).records(path)):
            yield f"{name} {number}", kind, record
    for name in GOLDEN:
        given = json.loads((GOLDEN_FOLDER / f"{name}.json").read_text())
        yield name, given["source"], Record("", json.dumps(given["record"]).encode(), 0)


def sent(one, turn):
    """What a client sends for a turn: calls with their arguments as text."""
    messages = json.loads(json.dumps(one.chat()[:turn]))
    for message in messages:
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return {"model": "m", "messages": messages, **({"tools": one.tools} if one.tools else {})}


def prompts(folder, parser, requests, options="{}"):
    """SGLang's token ids for every request."""
    environment = {
        "PYTHONPATH": str(STAND_INS),
        "SGLANG_USE_CPU_ENGINE": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("wire.py")), str(folder), parser, options],
        input="".join(json.dumps(request) + "\n" for request in requests), capture_output=True, text=True,
        env=os.environ | environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def served(reference, tmp_path):
    """A folder that a server would read, with an official template."""

    def folder(template):
        tokenizer, _, jinja = OFFICIAL[template]
        shutil.copytree(reference / "tokenizers" / tokenizer, tmp_path / template)
        shutil.copy(reference / "templates" / jinja, tmp_path / template / "chat_template.jinja")
        return tmp_path / template

    return folder


def test_the_server_whose_reading_is_followed_is_the_one_of_the_lock():
    assert f"SGLang {version('sglang')}" == SERVER


@pytest.mark.run
@pytest.mark.parametrize("template", OFFICIAL)
def test_every_prompt_of_the_cases_and_golden_files_is_what_the_server_makes_of_the_request(
    reference, served, template
):
    chat = official(reference, template)
    reading = Reading(Joins(other=chat.template.parts_join()))
    wanted, asked = [], []
    for name, kind, record in records():
        try:
            one = trajectory_options.without_thinking(read_trajectory(record, source(kind), reading), CHOSEN)
            one = trajectory_options.without_special_tokens(one, chat.special, CHOSEN)
            turns, *_ = trajectory_options.supervised(one, CHOSEN)
            encoded = chat.encode(one, turns)
        except Rejected:
            continue
        for e in encoded:
            for turn in e.turns:
                wanted.append((name, turn.message, e.tokens[: turn.prompt].tolist()))
                asked.append(sent(one, turn.message))
    found = prompts(served(template), PARSERS[template], asked)
    assert len(wanted) > 60 and {*PARSERS} == {*OFFICIAL}
    wrong = [
        (name, message, chat.tokenizer.decode(tokens), got if isinstance(got, dict) else chat.tokenizer.decode(got))
        for (name, message, tokens), got in zip(wanted, found, strict=True)
        if got != tokens
    ]
    assert not wrong, (len(wrong), wrong[0])


@pytest.mark.run
@pytest.mark.parametrize("template", ["glm4.5", "qwen3"])
def test_text_parts_are_joined_as_the_server_joins_them(reference, served, template):
    """Sent as they are in the record: parts, not text."""
    chat = official(reference, template)
    reading = Reading(Joins(other=chat.template.parts_join()))
    asked, wanted = [], []
    for record in source("openai").records(CASES / "parts.jsonl"):
        raw, one = json.loads(record.raw), read_trajectory(record, source("openai"), reading)
        last = one.assistant_turns()[-1]
        asked.append(
            {"model": "m", "messages": raw["messages"][:last], **({"tools": raw["tools"]} if raw.get("tools") else {})}
        )
        wanted.append(chat.tokenise(chat.prompt(one.chat()[:last], one.tools)).tolist())
    assert prompts(served(template), PARSERS[template], asked) == wanted


@pytest.mark.run
def test_options_of_the_template_are_the_servers_and_broken_arguments_end_what_it_accepts(reference, served):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a'}}
    hi = {"role": "user", "content": "Hi."}
    broken = [
        hi,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "x"},
    ]
    folder = served("qwen3")
    thinking, refused = prompts(folder, "qwen25", [{"model": "m", "messages": m} for m in ([hi], broken)])
    (plain, _) = prompts(folder, "qwen25", [{"model": "m", "messages": [hi]}] * 2, '{"enable_thinking": false}')
    chat = official(reference, "qwen3")
    assert chat.tokenizer.decode(plain) == chat.tokenizer.decode(thinking) + "<think>\n\n</think>\n\n"
    assert "must be valid JSON" in refused["refused"]
