"""The proof of the masks, with this project's tiny templates and with the official ones."""

import json
import shutil

import numpy as np
import pytest

from data_prep.sources import read_trajectories
from data_prep.text.chat import Chat
from data_prep.text.tokenizer import load_tokenizer
from data_prep.trajectory import Rejected
from recipes.config import Family, Thinking
from recipes.errors import ConfigError, DataError
from tests.conftest import REPO
from tests.data_prep.support import (
    OFFICIAL,
    assert_proved,
    assistant,
    call,
    conversation,
    official,
    result,
    spoken,
    user,
)

TRAJECTORIES = list(read_trajectories(REPO / "data_prep" / "sample" / "train.jsonl", "limi"))
REASONED = conversation(
    user("one"), assistant("1", reasoning_content="because"), user("two"), assistant("2", reasoning_content="as before")
)


@pytest.fixture(params=["qwen3-tiny", "glm4.5-tiny", *OFFICIAL])
def chat(request):
    if request.param in OFFICIAL:
        return official(request.getfixturevalue("reference"), request.param)
    base = request.getfixturevalue("bases")[request.param]
    return Chat(load_tokenizer(base), Family.qwen3 if "qwen" in request.param else Family.glm4_moe)


@pytest.fixture(params=OFFICIAL)
def named(request, reference):
    return request.param, official(reference, request.param)


def texts(chat, encoded):
    return [[chat.tokenizer.decode(e.tokens[t.start : t.end]) for t in e.turns] for e in encoded]


def test_the_sample_is_one_proved_sequence_each(chat):
    for trajectory in TRAJECTORIES:
        turns = trajectory.assistant_turns()
        (encoded,) = chat.encode(trajectory, turns)
        assert_proved(chat, trajectory, [encoded], turns)


def test_supervised_text_is_what_the_assistant_said_with_its_stop_token(named):
    name, chat = named
    for trajectory in TRAJECTORIES:
        (encoded,) = chat.encode(trajectory, trajectory.assistant_turns())
        expected = [spoken(name, m) for m in trajectory.messages if m.role == "assistant"]
        assert texts(chat, [encoded]) == [expected]


def test_reasoning_of_earlier_user_turns_starts_a_new_sequence(named):
    """Both hybrid families show it while its user turn is the last, and not after."""
    name, chat = named
    if name == "qwen3-2507":
        with pytest.raises(Rejected, match=r"leaves out its reasoning; write data\.thinking=drop"):
            chat.encode(REASONED, [1, 3])
        return
    encoded = chat.encode(REASONED, [1, 3])
    assert [e.begins for e in encoded] == ["first", "history"]
    assert_proved(chat, REASONED, encoded, [1, 3])
    assert texts(chat, encoded) == [[spoken(name, REASONED.messages[k])] for k in (1, 3)]
    assert "because" not in chat.tokenizer.decode(encoded[1].tokens), "as inference will not see it either"


@pytest.mark.parametrize("reasoning", ["12", "The answer", "think", "k>", "|>", "user", "im_end"])
def test_reasoning_that_also_stands_elsewhere_in_the_turn_is_not_taken_for_shown(named, reasoning):
    name, chat = named
    said = assistant("The answer is 12", reasoning_content=reasoning)
    trajectory = conversation(user(), said, user(), assistant("2"))
    if name == "qwen3-2507":
        for turns in ([1], [1, 3]):
            with pytest.raises(Rejected, match="leaves out its reasoning"):
                chat.encode(trajectory, turns)
        return
    encoded = chat.encode(trajectory, [1, 3])
    assert_proved(chat, trajectory, encoded, [1, 3])
    assert texts(chat, encoded) == [[spoken(name, trajectory.messages[k])] for k in (1, 3)]


def test_the_empty_thought_of_a_last_message_is_left_out(reference):
    """Qwen3's template gives it to the final message alone: neither its prompt nor any later one has it."""
    chat = official(reference, "qwen3")
    trajectory = conversation(user(), assistant("", call("1")), result("1"), assistant("done"))
    (encoded,) = chat.encode(trajectory, [1, 3])
    assert_proved(chat, trajectory, [encoded], [1, 3])
    rendered = chat.tokenizer.apply_chat_template(trajectory.chat(), tools=trajectory.tools, tokenize=False)
    assert rendered.endswith("<think>\n\n</think>\n\ndone<|im_end|>\n")
    assert texts(chat, [encoded])[0][1] == "done<|im_end|>"


def test_a_turn_that_joins_its_prompt_in_one_token_ends_its_sequence(reference):
    """Inference sends 'assistant\\n'; with content that begins with newlines the whole text has other tokens there."""
    chat = official(reference, "qwen3-2507")
    trajectory = conversation(user(), assistant("\n\n1"), user(), assistant("2"), user(), assistant("3"))
    encoded = chat.encode(trajectory, [1, 3, 5])
    assert [(e.begins, [t.message for t in e.turns]) for e in encoded] == [("first", [1]), ("tokens", [3, 5])]
    assert_proved(chat, trajectory, encoded, [1, 3, 5])
    assert texts(chat, encoded) == [["\n\n1<|im_end|>"], ["2<|im_end|>", "3<|im_end|>"]]


def test_turns_that_are_not_supervised_are_context(named):
    name, chat = named
    trajectory = conversation(user(), assistant("1"), user(), assistant("2"), user(), assistant("3"))
    (encoded,) = chat.encode(trajectory, [3])
    assert_proved(chat, trajectory, [encoded], [3])
    assert "1" in chat.tokenizer.decode(encoded.tokens) and "3" not in chat.tokenizer.decode(encoded.tokens)


def test_thinking_as_context_moves_the_start_behind_it(named):
    name, chat = named
    if name == "qwen3-2507":
        pytest.skip("Qwen3-2507 Instruct has no thinking")
    encoded = chat.encode(REASONED, [1, 3], Thinking.context)
    assert_proved(chat, REASONED, encoded, [1, 3])
    assert [t[0].strip() for t in texts(chat, encoded)] == [f"{n}{chat.family.closing or '<|im_end|>'}" for n in "12"]


def test_two_assistant_messages_in_a_row_each_end_with_a_stop_token(named):
    name, chat = named
    trajectory = conversation(user(), assistant("1"), assistant("2"), user(), assistant("3"))
    encoded = chat.encode(trajectory, [1, 2, 4])
    assert_proved(chat, trajectory, encoded, [1, 2, 4])
    assert [t for e in texts(chat, encoded) for t in e] == [spoken(name, trajectory.messages[k]) for k in (1, 2, 4)]


def test_a_last_turn_with_calls_ends_as_one_that_waits_for_results(named):
    name, chat = named
    trajectory = conversation(user(), assistant("", call("1", a=1)))
    (encoded,) = chat.encode(trajectory, [1])
    assert texts(chat, [encoded]) == [[spoken(name, trajectory.messages[1])]]
    stop = chat.tokenizer.decode(encoded.tokens[-1:])
    assert stop == ("<|observation|>" if name == "glm4.5" else "<|im_end|>")


def test_what_a_template_leaves_out_is_refused(bases):
    chat = Chat(load_tokenizer(bases["qwen3-tiny"]), Family.qwen3)
    chat.tokenizer.chat_template = chat.tokenizer.chat_template.replace("{{- m.content -}}", "")
    with pytest.raises(Rejected, match="leaves out its content"):
        chat.encode(conversation(assistant("hello there"), user(), assistant("hello there")), [2])


def test_a_template_that_fails_rejects_the_record(reference):
    chat = official.__wrapped__(reference, "qwen3")
    chat.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}" + chat.tokenizer.chat_template
    with pytest.raises(Rejected, match="roles must alternate"):
        chat.encode(conversation(user(), assistant("1")), [1])


def test_a_tokenizer_that_does_not_part_text_at_special_tokens_is_refused(bases, monkeypatch):
    tokenise = Chat.tokenise
    monkeypatch.setattr(Chat, "tokenise", lambda self, text: tokenise(self, text.replace("> ", ">")))
    with pytest.raises(DataError, match="does not split text"):
        Chat(load_tokenizer(bases["qwen3-tiny"]), Family.qwen3)


def test_a_family_needs_its_tokens(bases):
    with pytest.raises(DataError, match="no special token"):
        Chat(load_tokenizer(bases["qwen3-tiny"]), Family.glm4_moe)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"model\.checkpoint=FOLDER"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_cuts_texts_short_does_not(bases, tmp_path):
    for file in bases["qwen3-tiny"].glob("*token*"):
        shutil.copy(file, tmp_path)
    shutil.copy(bases["qwen3-tiny"] / "chat_template.jinja", tmp_path)
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    settings["truncation"] = {"direction": "Right", "max_length": 20, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    assert len(Chat(load_tokenizer(tmp_path), Family.qwen3).tokenise("word " * 100)) > 100


def test_tokens_are_int32(bases):
    tokens = Chat(load_tokenizer(bases["qwen3-tiny"]), Family.qwen3).tokenise("a b")
    assert tokens.dtype == np.int32


TAGGED = "  I look <observation>a ü€ b</observation> and say done."
FROM, TO = TAGGED.index("<obs"), TAGGED.index(" and")


@pytest.mark.parametrize("thought", [None, "Hm."])
def test_characters_that_are_not_learned_are_context_of_their_turn(chat, thought):
    """Text inside a turn that no model said, such as an observation between tags."""
    more = {"reasoning_content": thought} if thought else {}
    one = conversation(
        user(), assistant(TAGGED, unsupervised=[[FROM, TO]], **more), user(), assistant("Yes!", unsupervised=[[0, 4]])
    )
    plain = one.model_copy(update={"messages": [m.model_copy(update={"unsupervised": None}) for m in one.messages]})
    try:
        encoded = chat.encode(one, [1, 3])
    except Rejected as error:
        assert thought and "reasoning" in error.problem, "a template that shows no reasoning"
        return
    for e, whole in zip(encoded, chat.encode(plain, [1, 3]), strict=True):
        assert e.tokens.tolist() == whole.tokens.tolist() and e.begins == whole.begins
        assert e.turns[-1].end == len(e.tokens), "the stop token is always learned"
    learned = "".join(text for of_sequence in texts(chat, encoded) for text in of_sequence)
    assert not any(text in learned for text in ("observation", "ü", "Yes"))
    assert learned.count("I look") == 1 and " and say done." in learned and ("Hm." in learned) == bool(thought)


@pytest.mark.parametrize("spans", [[[0, 99]], [[3, 2]], [[2, 5], [4, 6]], [[1]], [[-1, 2]]])
def test_spans_that_are_none_are_refused(spans):
    with pytest.raises(Rejected, match="spans are \\[start, end\\], in order, apart, and within content"):
        conversation(user(), assistant("I look.", unsupervised=spans))


def test_a_span_keeps_its_characters_where_special_tokens_are_escaped():
    one = conversation(user(), assistant("<|a|> x <|a|> y", unsupervised=[[6, 7]]))
    moved = one.map_texts(lambda text: text.replace("<|a|>", "< |a|>"))
    ((start, end),) = moved.messages[1].unsupervised
    assert moved.messages[1].content[start:end] == "x"


@pytest.fixture
def thinker(reference):
    """A template whose prompt opens the thought, as those of Qwen3-Thinking-2507 and GLM-4.7 do, over Qwen3's."""
    tokenizer = load_tokenizer(reference / "tokenizers" / "qwen3_hf")
    source = (reference / "templates" / "Qwen3.jinja").read_text()
    plain = "{{- '<|im_start|>assistant\\n' }}"
    assert source.count(plain) == 1
    tokenizer.chat_template = source.replace(plain, "{{- '<|im_start|>assistant\\n<think>\\n' }}")
    return Chat(tokenizer, Family["qwen3"])


THOUGHTFUL = [
    user(), assistant("I look.", call("1", a=1), reasoning_content="r1"), result("1"), assistant("One.", reasoning_content="r2"),
    user(), assistant("Two.", reasoning_content="r3"),
]  # fmt: skip


def test_where_the_prompt_opens_the_thought_the_turn_begins_with_it(thinker):
    one = conversation(*THOUGHTFUL)
    encoded = thinker.encode(one, [1, 3, 5])
    assert_proved(thinker, one, encoded, [1, 3, 5])
    assert [[text.split("\n\n")[0] for text in of_sequence] for of_sequence in texts(thinker, encoded)] == [
        ["r1\n</think>", "r2\n</think>"], ["r3\n</think>"]
    ]  # fmt: skip
    shown = thinker.encode(one, [1, 3, 5], Thinking.context)
    assert texts(thinker, shown)[1] == ["\n\nTwo.<|im_end|>"]


def test_a_turn_without_reasoning_would_teach_such_a_model_not_to_think(thinker):
    """No advice makes wrong data: neither to drop the thinking, nor to leave it out."""
    with pytest.raises(Rejected, match="message 1 has no reasoning.*write weight 0 at it"):
        thinker.encode(conversation(user(), assistant("One.")), [1])
    with pytest.raises(Rejected, match="it would learn not to think; write data.thinking=supervise or context"):
        thinker.encode(conversation(user(), assistant("One.")), [1], Thinking.drop)


def test_an_option_of_the_template_changes_the_prompt_and_an_unknown_one_is_refused(reference):
    tokenizer = load_tokenizer(reference / "tokenizers" / "qwen3_hf")
    tokenizer.chat_template = (reference / "templates" / "Qwen3.jinja").read_text()
    chat = Chat(tokenizer, Family["qwen3"], {"enable_thinking": "false"})
    one = conversation(user(), assistant("One."), user(), assistant("Two."))
    encoded = chat.encode(one, [1, 3])
    for e in encoded:
        for t in e.turns:
            prompt = tokenizer.apply_chat_template(
                one.chat()[: t.message],
                tools=one.tools,
                add_generation_prompt=True,
                enable_thinking=False,
                return_dict=False,
            )
            assert e.tokens[: t.prompt].tolist() == prompt
    assert texts(chat, encoded) == [["One.<|im_end|>"], ["Two.<|im_end|>"]]
    with pytest.raises(
        ConfigError, match=r"model\.template_options\.enable_thinkin: the chat template.*does not read it"
    ) as error:
        Chat(tokenizer, Family["qwen3"], {"enable_thinkin": "false"})
    assert "it reads enable_thinking" in error.value.fix
