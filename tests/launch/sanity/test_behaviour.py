"""Each check of answers passes on good ones and fails on the fault it is for, by name."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.checks import Outcome
from launch.sanity.behaviour import answers
from recipes.config import Family
from tests.launch.sanity.said import PLAN, fails, of, turn

CALL_MARKS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<arg_key>", "</arg_key>", "<arg_value>",
              "</arg_value>", "<think>", "</think>", "<|endoftext|>"]  # fmt: skip
ROLES = {
    Family.qwen3: ["<|im_start|>", "<|im_end|>"],
    Family.glm4_moe: ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"],
}
FAMILY_MARKS = [(family, mark) for family, roles in ROLES.items() for mark in CALL_MARKS + roles]
GOOD = [of(turn(PLAN), finish_reason="tool_calls"), of(turn(content="The file says oak, then red, then nothing else."))]


@pytest.mark.parametrize("family", Family)
def test_good_answers_pass_every_check(family):
    done = [answers.right_calls("calls", GOOD, 1), *answers.all_checks(GOOD, family, 1)]
    assert {c.outcome for c in done} == {Outcome.passed}
    assert len({c.name for c in done}) == len(done) == 8
    assert {c.outcome for c in answers.all_checks([], family, 1)} == {Outcome.passed}, "none to judge"


@pytest.mark.parametrize(
    "more",
    [{"calls": []}, {"calls": [("write", PLAN[1])]}, {"calls": [("read", {"path": "log.txt"})]}, {"calls": [PLAN, PLAN]},
     {"finish_reason": "length"}],
)  # fmt: skip
def test_calls_that_are_not_the_record_s_are_counted(more):
    wrong = [*GOOD, of(turn(PLAN), **more)]
    check = answers.right_calls("calls on trained prompts", wrong, 0.9)
    assert fails(check, "calls on trained prompts", "abc, message 1: expected [('read', {'path': 'plan.txt'})], got")
    assert check.figure == "1 of 2 (50%)" and check.limit == "at least 90%, within twice the recorded length"
    assert answers.right_calls("calls", wrong, 0.5).outcome is Outcome.passed
    assert answers.right_calls("calls", wrong, None).outcome is Outcome.passed


def test_the_base_is_compared_on_what_it_was_asked_and_that_is_said():
    asked = [turn(PLAN, request=str(n)) for n in range(4)]
    after = [of(asked[0]), of(asked[1], calls=[]), of(asked[2]), of(asked[3])]
    before = [of(asked[2], finish_reason="length"), of(asked[1], calls=[])]
    check = answers.beside_base(before, after, 4)
    assert (check.name, check.outcome) == ("the base on trained prompts", Outcome.passed)
    assert check.figure == "0 of 2 (0%), the trained model 1 of 2"
    assert check.limit == "shown, within twice the recorded length"
    assert check.detail.startswith(
        "2 of the 4 prompts, drawn with the seed: enough to show what training changed. abc,"
    )
    assert answers.beside_base(before, [], 4).figure == "0 of 2 (0%)", "where the trained model was not asked"
    assert answers.beside_base([], [], 0).figure == "none to judge"


def test_a_runaway_is_caught_by_its_stop_token():
    runs = [*GOOD, of(turn(PLAN), finish_reason="length", content="I read it. I read")]
    assert fails(answers.stops(runs, 1), "stop token", "(length)")
    assert answers.stops(runs, 0.9).limit == "at least 90%, within twice the recorded length"
    assert answers.stops(runs, 0.6).outcome is Outcome.passed
    assert answers.stops([of(turn(), finish_reason="abort")], 0.95).outcome is Outcome.failed


def test_a_burst_of_calls_is_caught_and_the_record_s_own_number_is_none():
    counts = [(1, "one"), (2, "two")]
    fine = answers.bursts("calls per turn", counts, [1, 1])
    assert fine.outcome is Outcome.passed and fine.figure == "1.50, at most 2; recorded 1.00, at most 1"
    assert fails(answers.bursts("calls per turn", [*counts, (3, "many")], [1, 1]), "calls per turn", "many")
    assert answers.bursts("calls per turn", [(3, "three")], []).outcome is Outcome.failed
    found = {c.name: c for c in answers.all_checks([*GOOD, of(turn(), calls=[PLAN] * 3)], Family.qwen3, 0.5)}
    assert found["calls per turn"].outcome is Outcome.failed
    assert answers.bursts("calls per turn", [], []).outcome is Outcome.passed


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (("delete", {}), "delete is not one of the tools read"),
        (("read", '{"path": '), "arguments of read are not a JSON object: '{\"path\": '"),
        (("read", ["plan.txt"]), "arguments of read are not a JSON object"),
        (("read", {}), "read: 'path' is a required property"),
        (("read", {"path": 7}), "read: 7 is not of type 'string'"),
    ],
)
def test_a_call_that_a_tool_refuses_is_caught(call, says):
    wrong = [*GOOD, of(turn(PLAN), calls=[PLAN, call])]
    assert fails(answers.valid_calls(wrong, 0.95), "calls match their schema", f"abc, message 1: {says}")
    assert answers.valid_calls(wrong, 0.95).figure == "2 of 3 (67%)"


def test_a_tool_without_a_schema_takes_any_object():
    bare = turn(("now", {}), tools=[{"type": "function", "function": {"name": "now"}}])
    assert answers.valid_calls([of(bare)], 1).outcome is Outcome.passed


@pytest.mark.parametrize(("family", "mark"), FAMILY_MARKS)
@pytest.mark.parametrize("where", ["content", "reasoning"])
def test_every_mark_in_text_is_caught(family, mark, where):
    wrong = [*GOOD, of(turn(PLAN), **{where: f"I read it.{mark} Then"})]
    assert fails(answers.leaks(wrong, family, 0.95), "no marks in text", f"abc, message 1: {mark} in")


def test_roles_of_the_other_family_are_only_text():
    text = of(turn(), content="GLM opens with <|observation|> here")
    assert answers.leaks([text], Family.qwen3, 1).outcome is Outcome.passed


def test_thinking_and_words_in_each_other_s_place_are_caught():
    thinks = turn(thinking="It is oak.", content="Oak.")
    hidden = of(turn(), content="", reasoning="I read it.")
    shown = of(thinks, content="It is oak.Oak.", reasoning="")
    assert answers.separated([of(thinks), *GOOD]).outcome is Outcome.passed
    for wrong in (hidden, shown):
        assert fails(answers.separated([*GOOD, wrong]), "thinking apart", "--reasoning-parser")
    other = of(thinks, content="Something else.", reasoning="")
    assert answers.separated([other]).figure == "none to judge"


texts = st.text(st.sampled_from("abcdefg ,.\nüж好"), max_size=200)
units = st.text(st.sampled_from("abc .\n好"), min_size=1, max_size=40).filter(lambda u: not u.isspace())


@given(before=texts, unit=units, more=st.integers(0, 20))
def test_any_unit_that_comes_often_enough_is_a_repetition(before, unit, more):
    times = max(4, -(-60 // len(unit))) + more
    found = answers.repeated(before + unit * times)
    assert found and (before + unit * times).endswith(found * 4) and len(found) <= len(unit)


@given(st.integers(0, 2**32), st.integers(0, 400))
def test_text_that_says_everything_once_is_no_repetition(seed, length):
    text = " ".join(str(seed + n * n) for n in range(length))
    assert answers.repeated(text) is None


@given(unit=units, after=st.integers(1, 3))
def test_what_goes_on_otherwise_or_comes_thrice_is_none(unit, after):
    assert answers.repeated(unit * 100 + "xyz"[:after]) is None
    assert answers.repeated(f"unlike it {unit}" * 3) is None


@pytest.mark.parametrize("text", ["", "ok", "----", "=" * 59, "Read. " * 3, " " * 500, "\n" * 500])
def test_rules_short_lines_and_space_are_no_repetition(text):
    assert answers.repeated(text) is None


def test_an_answer_that_repeats_itself_is_caught_in_words_and_in_thinking():
    loop = "I read it. " * 8
    for wrong in (of(turn(), content=loop), of(turn(), content="", reasoning=loop)):
        assert fails(answers.repetition([*GOOD, wrong], 0.95), "no repetition", "abc, message 1: it ends by repeating")


JAPANESE, CHINESE = "ファイルを読んで内容を教えてください", "我已经读完了这个文件并且写下了它的内容"


@pytest.mark.parametrize(
    ("request_", "content", "outcome"),
    [
        ("Read the file plan.txt.", CHINESE, Outcome.failed),
        ("Read the file plan.txt.", "Прочитал файл и записал его содержимое", Outcome.failed),
        (CHINESE, "I have read the whole file now.", Outcome.failed),
        (JAPANESE, "内容は「樫」です。ファイルを読みました。", Outcome.passed),
        (JAPANESE, "ありがとうございましたまたどうぞ", Outcome.passed),
        ("Read the file plan.txt.", "读完了", Outcome.passed),
        ("Read the file plan.txt.", "Il file è già stato letto.", Outcome.passed),
        ("Read the file plan.txt.", "12345 67890 12345 67890 ____", Outcome.passed),
    ],
)
def test_a_language_that_changed_is_caught(request_, content, outcome):
    check = answers.language([*GOOD, of(turn(content="", request=request_), content=content)], 0.95)
    assert (check.name, check.outcome) == ("same language", outcome), check
    if outcome is Outcome.failed:
        assert "but the conversation is" in check.detail


def test_languages_are_named_by_their_script_and_too_little_is_not_judged():
    assert answers.script(JAPANESE) == answers.script(CHINESE) == "CJK"
    assert answers.script("Прочитал файл") == "CYRILLIC"
    assert answers.script("elevenchars") is None and answers.script("twelve chars ") is None
    assert answers.script("thirteenchars") == "LATIN"


def test_words_of_a_tool_decide_no_language():
    asked = turn(content="", request="Read the file plan.txt.")
    asked.conversation["messages"][0:0] = [{"role": "user", "content": None}]
    assert answers.language([of(dataclasses.replace(asked, index=2), content=CHINESE)], 1).outcome is Outcome.failed
