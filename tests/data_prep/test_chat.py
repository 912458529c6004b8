"""The proof of the masks, with this project's tiny templates and with the official ones."""

import pytest

from data_prep import limi
from data_prep.chat import Chat, load_tokenizer
from data_prep.trajectory import validate
from recipes.config import Family
from recipes.errors import DataError
from tests.conftest import REPO

TRAJECTORIES = list(limi.read(REPO / "data_prep" / "sample" / "train.jsonl"))
OFFICIAL = {Family.qwen3: "qwen3_hf", Family.glm4_moe: "glm45_standin_hf"}


@pytest.fixture(params=["qwen3-tiny", "glm4.5-tiny", "official-qwen3", "official-glm4_moe"])
def chat(request):
    name = request.param
    if name.startswith("official-"):
        family = Family(name.removeprefix("official-"))
        return Chat(load_tokenizer(request.getfixturevalue("reference") / "tokenizers" / OFFICIAL[family]), family)
    base = request.getfixturevalue("bases")[name]
    return Chat(load_tokenizer(base), Family.qwen3 if "qwen" in name else Family.glm4_moe)


def test_supervised_text_is_what_the_assistant_said_with_its_stop_token(chat):
    for trajectory in TRAJECTORIES:
        encoded = chat.encode(trajectory)
        said = [m for m in trajectory.messages if m.role == "assistant"]
        assert len(encoded.spans) == len(said)
        for (start, end), message in zip(encoded.spans, said, strict=True):
            text = chat.tokenizer.decode(encoded.tokens[start:end])
            assert text.endswith(chat.stops.tokens), "the stop token is supervised"
            assert sum(text.count(stop) for stop in chat.stops.tokens) == 1
            assert message.content in text
            for call in message.tool_calls or []:
                assert call.function.name in text


def test_every_prefix_is_the_prompt_that_inference_sends(chat):
    """The proof again, written apart from the code that runs it."""
    trajectory = max(TRAJECTORIES, key=lambda t: len(t.messages))
    encoded = chat.encode(trajectory)
    turns = [k for k, m in enumerate(trajectory.messages) if m.role == "assistant"]
    for (start, _), k in zip(encoded.spans, turns, strict=True):
        prompt = chat.tokenizer.apply_chat_template(
            trajectory.chat()[:k], tools=trajectory.tools, add_generation_prompt=True, return_dict=False
        )
        assert encoded.tokens[:start] == prompt


def test_reasoning_in_an_earlier_user_turn_cannot_be_one_sequence(chat):
    """Both families drop it once a later user turn follows: the turn would be trained without its own reasoning."""
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1", "reasoning_content": "because"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "2"},
    ]
    with pytest.raises(DataError, match="leaves out its reasoning"):
        chat.encode(validate({"id": "x", "messages": messages, "tools": []}, "x"))


@pytest.mark.parametrize("place", ["content", "value", "key"])
def test_a_special_token_in_content_is_refused(chat, place):
    stop = chat.stops.tokens[0]
    arguments = {"content": {}, "value": {"a": [stop]}, "key": {stop: 1}}[place]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": f"a{stop}b" if place == "content" else "ab"},
        {"role": "assistant", "content": "done"},
    ]
    with pytest.raises(DataError, match="special token"):
        chat.encode(validate({"id": "x", "messages": messages, "tools": []}, "x"))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match="model.checkpoint=FOLDER"):
        load_tokenizer(tmp_path)
