"""Turns of the packed data, what is asked with them and put together of answers; prompts and parsers that are wrong are named."""

import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.pack.dataset import prepare
from launch.checks import Outcome
from launch.sanity.behaviour import parsers, prompts
from launch.sanity.behaviour.turns import answer, ask, longest_answer, parsed, spread, turns, usual_answer
from recipes.config import Family
from recipes.errors import SanityError
from tests.data_prep.pack.test_dataset import fresh, record  # noqa: F401  # a fixture
from tests.data_prep.support import assistant, user
from tests.launch.sanity.said import PLAN, TOOLS, fails, of, turn
from tests.launch.support import recipe_of


@given(st.lists(st.integers()), st.integers(1, 50))
def test_spread_takes_at_most_so_many_evenly_and_in_order(numbers, most):
    places = [SimpleNamespace(n=n) for n in range(len(numbers))]
    taken = [p.n for p in spread(places, most)]
    assert len(taken) == min(len(places), most)
    assert taken == sorted(set(taken))
    steps = [b - a for a, b in itertools.pairwise(taken)]
    assert not steps or max(steps) - min(steps) <= 1
    assert not taken or taken[0] == 0


def test_the_longest_answer_is_twice_the_longest_turn_and_never_too_short():
    def data(*spans):
        return SimpleNamespace(ids=spans, spans=lambda row: spans[row])

    assert longest_answer(data([(3, 10)], [(5, 405), (410, 411)])) == 800
    assert longest_answer(data([(3, 10)])) == 128


def test_an_answer_may_be_twice_its_recorded_turn_or_what_nine_of_ten_are():
    def data(*lengths):
        return SimpleNamespace(ids=lengths, spans=lambda row: [(5, 5 + lengths[row])])

    assert usual_answer(data(*range(10, 110, 10))) == 90 and usual_answer(data(*[30] * 9, 500)) == 30
    assert usual_answer(data(7)) == 7
    said = dataclasses.replace(turn(), tokens=np.arange(60), begin=10)
    assert [said.most(usual) for usual in (7, 49, 50, 51, 200)] == [100, 100, 100, 102, 400]
    assert turn().most(7) == 64, "never too short"


class Server:
    """Answers every path with what a function makes of the body."""

    def __init__(self, **paths):
        self.paths, self.asked = paths, []

    def post(self, path, body):
        self.asked.append((path, body))
        return self.paths[path.rpartition("/")[2]](body)

    def stream(self, path, body):
        yield from self.paths["stream"](body)


# One token a character: what a tokenizer is to the text, without one.
def decode(tokens):
    return "".join(map(chr, tokens))


def as_text(asked, text):
    return dataclasses.replace(asked, tokens=np.array([ord(c) for c in text]), begin=len(text))


TOOL_TEXT = '<tools>{"name": "read", "parameters": {}}</tools><user>Read "ü".<assistant>'
KNOWN = {
    "an extra key of the schema": (
        TOOL_TEXT, TOOL_TEXT.replace('"read"', '"read", "strict": false'), "The server writes strict into tools"),
    "two extra keys": (
        TOOL_TEXT, TOOL_TEXT.replace('"read"', '"read", "description": null, "defer_loading": null'),
        "The server writes defer_loading, description into tools"),
    "thinking switched off": (TOOL_TEXT, TOOL_TEXT + "<think>\n\n</think>\n\n", '"enable_thinking": true'),
    "thinking switched on": (TOOL_TEXT + "<think></think>\n", TOOL_TEXT, '"enable_thinking": false'),
    "a BOS token": (TOOL_TEXT, f"<s>{TOOL_TEXT}", "The server puts '<s>' before every prompt: set add_bos_token=false"),
    "escapes": (TOOL_TEXT, TOOL_TEXT.replace("ü", "\\u00fc"), "JSON is written with other escapes"),
    "escapes undone": (TOOL_TEXT.replace("ü", "\\u00fc"), TOOL_TEXT, "JSON is written with other escapes"),
    "none": (TOOL_TEXT, TOOL_TEXT.replace("<user>", "<human>"), "none of the known ones: compare chat_template.jinja"),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_cause_of_other_prompts_is_named_with_its_mend(name):
    mine, theirs, says = KNOWN[name]
    assert says in prompts.cause(mine, theirs)
    asked = as_text(turn(PLAN), mine)
    client = Server(tokenize=lambda body: {"tokens": [ord(c) for c in theirs]})
    check = prompts.parity(client, [asked], [of(asked, prompt=[ord(c) for c in theirs])], decode)
    assert fails(check, "chat template", says) and check.figure == "0 of 2 prompts equal"


def test_the_first_difference_of_prompts_is_shown_decoded():
    asked = as_text(turn(PLAN), "<user>Read plan.txt<assistant>")
    client = Server(tokenize=lambda body: {"tokens": asked.prompt})
    theirs = [ord(c) for c in "<user>Read log.txt<assistant>"]
    check = prompts.parity(client, [asked] * 2, [of(asked), of(asked, prompt=theirs)], decode)
    assert check.figure == "3 of 4 prompts equal"
    assert (
        "abc, message 1, token 11: trained on 'plan.txt' (30 tokens), the server sends 'log.txt<' (29" in check.detail
    )
    cut = prompts.parity(client, [asked], [of(asked, prompt=asked.prompt[:-3])], decode)
    assert "token 27: trained on 'nt>' (30 tokens), the server sends '' (27 tokens)" in cut.detail


def test_equal_prompts_pass_and_tokenize_is_asked_with_the_messages_and_tools():
    asked = as_text(turn(PLAN), TOOL_TEXT)
    client = Server(tokenize=lambda body: {"tokens": asked.prompt})
    check = prompts.parity(client, [asked] * 40, [of(asked)] * 30, decode)
    assert check.outcome is Outcome.passed and not check.detail
    assert client.asked[0] == (
        "/tokenize",
        {"model": "default", "messages": asked.conversation["messages"][:1], "tools": TOOLS},
    )
    assert len(client.asked) == 16 and check.figure == "46 of 46 prompts equal"
    only = Server(tokenize=lambda body: {"tokens": [7]})
    assert fails(prompts.parity(only, [asked], [of(asked)], decode), "chat template", "token 0"), (
        "/tokenize alone differs"
    )


def recorded(text, *calls, **more):
    return dataclasses.replace(turn(*calls, **more), tokens=np.array([*(ord(c) for c in text), 0]), begin=0)


def read_right(body):
    return {"calls": [{"name": "read", "parameters": '{"path": "plan.txt"}'}]}


def test_parsers_are_asked_for_the_data_s_own_text_without_stop_token_and_thinking():
    asked = recorded("<think>Well.</think>\nI read it.<tool_call>", PLAN, thinking="Well.")
    client = Server(parse_function_call=read_right, separate_reasoning=lambda body: {"reasoning_text": "\nWell.\n"})
    calls, thinking = parsers.gold(client, [asked, recorded("no calls")], Family.glm4_moe, decode)
    assert calls.outcome is thinking.outcome is Outcome.passed
    assert calls.figure == thinking.figure == "1 of 1 (100%)"
    sent = dict(client.asked)
    assert sent["/parse_function_call"] == {
        "text": "\nI read it.<tool_call>",
        "tools": TOOLS,
        "tool_call_parser": "glm45",
    }
    assert sent["/separate_reasoning"] == {
        "text": "<think>Well.</think>\nI read it.<tool_call>", "reasoning_parser": "glm45"}  # fmt: skip


@pytest.mark.parametrize(
    "found",
    [[], [{"name": "write", "parameters": '{"path": "plan.txt"}'}], [{"name": "read", "parameters": '{"path": "p'}],
     [{"name": "read", "parameters": '{"path": 1}'}], read_right(None)["calls"] * 2],
)  # fmt: skip
def test_a_parser_that_reads_calls_wrongly_is_caught(found):
    client = Server(parse_function_call=lambda body: {"calls": found})
    calls, thinking = parsers.gold(client, [recorded("I read it.", PLAN)], Family.qwen3, decode)
    assert fails(calls, "tool-call parser qwen25", "abc, message 1: [('read', {'path': 'plan.txt'})] is read as")
    assert thinking.figure == "none to judge"


@pytest.mark.parametrize("found", [None, "", "Well", "Well.</think>"])
def test_a_parser_that_reads_thinking_wrongly_is_caught(found):
    client = Server(separate_reasoning=lambda body: {"reasoning_text": found})
    _, thinking = parsers.gold(client, [recorded("<think>Well.</think>Yes", thinking="Well.")], Family.qwen3, decode)
    assert fails(thinking, "reasoning parser qwen3", "abc, message 1: thinking 'Well.' is read as")


def chunk(reason=None, **delta):
    return {"choices": [{"delta": delta, "finish_reason": reason}]}


def piece(index, arguments=None, name=None):
    return {"index": index, "function": {"name": name, "arguments": arguments}}


def test_a_stream_with_pieces_of_arguments_and_a_count_of_tokens_is_put_together():
    stream = [
        chunk(role="assistant", content=""), chunk(reasoning_content="We"), chunk(reasoning_content="ll."),
        chunk(content="I "), chunk(content="read."), chunk(tool_calls=[piece(0, "", "read")]),
        chunk(tool_calls=[piece(0, '{"path": "pl')]), chunk(tool_calls=[piece(0, 'an.txt"}'), piece(1, None, "read")]),
        chunk(tool_calls=[piece(1, '{"path": "log.txt"}')]), chunk("tool_calls"), {"choices": [], "usage": {"total": 7}},
    ]  # fmt: skip
    message, reason = parsers.assembled(iter(stream))
    assert reason == "tool_calls"
    assert message["content"] == "I read." and message["reasoning_content"] == "Well."
    assert answer(turn(), message, reason).calls == [PLAN, ("read", {"path": "log.txt"})]
    assert parsers.assembled(iter([]))[1] == ""


json_objects = st.dictionaries(st.text(max_size=5), st.text(max_size=8) | st.integers() | st.none(), max_size=3)
messages = st.fixed_dictionaries(
    {
        "content": st.text(max_size=12),
        "reasoning_content": st.text(max_size=12),
        "tool_calls": st.lists(st.tuples(st.text(min_size=1, max_size=5), json_objects), max_size=3),
    }
)


@given(messages, st.data())
def test_a_message_cut_into_any_pieces_is_put_together_again(message, data):
    def cut(text):
        edges = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
        return [text[a:b] for a, b in zip([0, *edges], [*edges, len(text)], strict=True)]

    calls = [{"name": name, "arguments": json.dumps(words)} for name, words in message["tool_calls"]]
    deltas = [{key: text} for key in ("reasoning_content", "content") for text in cut(message[key])]
    for n, call in enumerate(calls):
        first, *rest = cut(call["arguments"])
        deltas += [{"tool_calls": [piece(n, first, call["name"])]}, *({"tool_calls": [piece(n, a)]} for a in rest)]
    found, reason = parsers.assembled(iter([*(chunk(**delta) for delta in deltas), chunk("stop"), {"choices": []}]))
    assert found == {**message, "tool_calls": [{"function": call} for call in calls]}
    assert reason == "stop"


def whole(**message):
    return lambda body: {"choices": [{"message": message, "finish_reason": "stop"}]}


def test_a_stream_that_says_something_else_is_caught():
    same = Server(
        completions=whole(content="I read it."),
        stream=lambda body: [chunk(content="I read "), chunk("stop", content="it.")],
    )
    assert parsers.streaming(same, [turn()] * 20, 10).figure == "8 of 8 (100%)"
    assert same.asked[0][1]["temperature"] == 0 and "stream" not in same.asked[0][1]
    lost = Server(completions=whole(content="I read it."), stream=lambda body: [chunk("stop", content="I read ")])
    assert fails(parsers.streaming(lost, [turn()], 10), "streaming", "whole: abc, message 1:")
    endless = Server(completions=whole(content="I read it."), stream=lambda body: [chunk(content="I read it.")])
    assert parsers.streaming(endless, [turn()], 10).outcome is Outcome.failed, "no reason to end"


def test_answers_come_in_the_order_asked_and_each_is_counted():
    def echo(body):
        assert body["max_tokens"] == 200
        said = {"content": f" {body['messages'][0]['content']}\n", "reasoning_content": None, "tool_calls": None}
        return {"choices": [{"message": said, "finish_reason": "stop", "prompt_token_ids": [9]}]}

    seen, asked = [], [turn(request=str(n)) for n in range(40)]
    found = ask(Server(completions=echo), asked, 100, {"temperature": 0.5}, lambda: seen.append(1))
    assert [a.content for a in found] == [str(n) for n in range(40)] and len(seen) == 40
    assert found[0].prompt == [9] and found[0].calls == []

    def refuse(body):
        raise SanityError("SGLang answered 500")

    with pytest.raises(SanityError, match="answered 500"):
        ask(Server(completions=refuse), asked, 10, {}, lambda: None)


def test_the_opening_mark_that_a_parser_leaves_is_no_thinking_and_broken_arguments_stay_text():
    assert answer(turn(), {"reasoning_content": "\n<think>Well.\n", "content": None}, "stop").reasoning == "Well."
    assert parsed('{"a": 1}') == {"a": 1} and parsed('{"a": ') == '{"a": ' and parsed("") == ""


def said_with_thinking(folder):
    """A record whose turns think and call, and the sample's first one."""

    def assistant(content, **more):
        return {"role": "assistant", "content": content, **more}

    call = {"id": "c1", "type": "function", "function": {"name": "read", "arguments": {"path": "plan.txt"}}}
    lines = [
        {"role": "user", "content": "Read plan.txt."}, assistant("I read it.", reasoning_content="It is a file.", tool_calls=[call]),
        {"role": "tool", "tool_call_id": "c1", "content": "oak"}, assistant("oak", reasoning_content="It says oak."),
        {"role": "user", "content": "Again."}, assistant("oak", reasoning_content="As before."),
    ]  # fmt: skip
    path = folder / "thinking.jsonl"
    path.write_text(json.dumps({"messages": lines, "tools": TOOLS}) + "\n")
    return path


@pytest.mark.parametrize("thinking", ["supervise", "context", "drop"])
@pytest.mark.parametrize("model", ["qwen3-tiny", "glm4.5-tiny"])
@pytest.mark.parametrize("own", [False, True])
def test_turns_are_the_sequences_tokens_with_the_prompt_that_was_trained_on(root, tmp_path, model, thinking, own):
    from data_prep.text.tokenizer import load_tokenizer

    words = [f"data.path={said_with_thinking(tmp_path)}"] if own else []
    recipe, data, heldout = recipe_of(root, f"model={model}", f"data.thinking={thinking}", *words)
    tokenizer = load_tokenizer(Path(recipe.model.checkpoint))
    count = 0
    for packed in (data, heldout):
        spans = [(row, end) for row in range(len(packed.ids)) for _, end in packed.spans(row)]
        all_turns = list(turns(packed))
        assert len(all_turns) == len(spans)
        for one, (row, end) in zip(all_turns, spans, strict=True):
            assert one.conversation["id"] == packed.ids[row]
            assert one.prompt + one.said == packed.tokens(row)[:end].tolist()
            before = one.conversation["messages"][: one.index]
            rendered = tokenizer.apply_chat_template(
                before, tools=one.conversation["tools"], add_generation_prompt=True, return_dict=False
            )
            assert one.prompt == list(rendered)
            assert one.message["role"] == "assistant"
            for text in (one.message["content"], one.message.get("reasoning_content") or ""):
                assert text in tokenizer.decode(one.said)
            count += 1
    assert count > (0 if own else 100)
    if own:
        assert data.thinks == (thinking != "drop")


def test_a_turn_of_which_a_part_is_not_learned_is_one_turn(fresh):  # noqa: F811
    """Its spans are several, and its prompt ends where its first token begins."""
    recipe, source = fresh
    said = assistant("<observation>a</observation> So it is done.", unsupervised=[[0, 28]])
    plain = assistant("<observation>a</observation> So it is done.")
    tail = [user("more"), assistant("ok")]
    data = prepare(recipe, source(record(user(), said, *tail, id="a"), record(user(), plain, *tail, id="b")))
    assert [len(data.spans(row)) for row in range(len(data.ids))] == [2, 2] and data.supervised[0] < data.supervised[1]
    first, second = ([t for t in turns(data) if t.conversation["id"] == name] for name in "ab")
    assert [t.index for t in first] == [t.index for t in second] == [1, 3]
    assert [t.begin for t in first] == [t.begin for t in second]
