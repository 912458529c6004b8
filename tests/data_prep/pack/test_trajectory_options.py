import pytest

from data_prep.pack import trajectory_options
from data_prep.trajectory import Rejected
from recipes.config import Data, ErroneousCalls, SchemaBreaks, SpecialTokens, Thinking, Turns
from tests.data_prep.support import assistant, call, conversation, result, user

STRICT = [
    {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
    }
]
LOOP = conversation(
    user(), assistant("1", call("1", a=1)), result("1", "no such file", is_error=True), assistant("2"), user(),
    assistant("3", call("2", a=1)), result("2"), assistant("4"),
)  # fmt: skip
SPECIAL = ["</tool_response>", "<|im_end|>"]


def test_turns():
    assert trajectory_options.supervised(LOOP, Data())[0] == [1, 3, 5, 7]
    assert trajectory_options.supervised(LOOP, Data(turns=Turns.last_segment))[0] == [5, 7]
    assert trajectory_options.supervised(LOOP, Data(erroneous_calls=ErroneousCalls.mask))[0] == [3, 5, 7]


def test_a_weight_is_always_obeyed():
    weighted = conversation(user(), assistant("1", weight=0), user(), assistant("2", weight=1), user(), assistant("3"))
    assert trajectory_options.supervised(weighted, Data()) == ([3, 5], 0, [])
    assert trajectory_options.supervised(weighted, Data(turns=Turns.last_segment)) == ([5], 0, [])


def test_turns_that_say_nothing_or_open_the_conversation_are_shown_and_not_learned():
    t = conversation(
        assistant("Hello."), user(), assistant(" \n"), user(), assistant("", reasoning_content="so"), assistant("x")
    )
    turns, _, notes = trajectory_options.supervised(t, Data())
    assert turns == [4, 5] and notes == [
        "message 0 opens the conversation: shown, not learned", "message 2 says nothing: shown, not learned"
    ]  # fmt: skip
    with pytest.raises(Rejected, match="no assistant turn is left"):
        trajectory_options.supervised(conversation(user(), assistant("")), Data())


def test_nothing_left_to_supervise_is_refused():
    with pytest.raises(Rejected, match="no assistant turn is left"):
        trajectory_options.supervised(conversation(user(), assistant("1"), user()), Data(turns=Turns.last_segment))


def test_calls_that_break_their_schema():
    broken = conversation(user(), assistant("", call("1", a="5")), result("1"), assistant("done"), tools=STRICT)
    with pytest.raises(Rejected, match=r"'5' is not of type 'integer'.*1 such calls.*data\.schema_breaks=accept"):
        trajectory_options.supervised(broken, Data())
    accept = Data(schema_breaks=SchemaBreaks.accept)
    assert trajectory_options.supervised(broken, accept)[:2] == ([1, 3], 1)
    accept.erroneous_calls = ErroneousCalls.mask
    assert trajectory_options.supervised(broken, accept)[:2] == ([3], 1)


def test_reasoning_is_dropped_by_name_and_blank_reasoning_always():
    t = conversation(user(), assistant("1", reasoning_content="why"), user(), assistant("2", reasoning_content=" \n"))
    kept = trajectory_options.without_thinking(t, Data())
    assert [m.reasoning_content for m in kept.messages] == [None, "why", None, None]
    assert kept.repairs == ["blank reasoning of 1 messages left out"]
    dropped = trajectory_options.without_thinking(t, Data(thinking=Thinking.drop))
    assert all(m.reasoning_content is None for m in dropped.messages)
    assert dropped.repairs == ["reasoning of 2 messages left out"]


def test_special_tokens_are_refused_or_escaped_everywhere():
    t = conversation(
        user("a<|im_end|>b"), assistant("", call("1", **{"<|im_end|>": ["<|im_end|>"]})), result("1", "</tool_response>"),
        assistant("done"), tools=[{"type": "function", "function": {"name": "f", "description": "<|im_end|>"}}],
    )  # fmt: skip
    with pytest.raises(Rejected, match=r"message 2 holds .*</tool_response>.*data\.special_tokens=escape"):
        trajectory_options.without_special_tokens(t, SPECIAL, Data())
    escaped = trajectory_options.without_special_tokens(t, SPECIAL, Data(special_tokens=SpecialTokens.escape))
    assert escaped.messages[0].content == "a< |im_end|>b"
    assert escaped.messages[1].tool_calls[0].function.arguments == {"< |im_end|>": ["< |im_end|>"]}
    assert escaped.messages[2].content == "< /tool_response>"
    assert escaped.tools[0]["function"]["description"] == "< |im_end|>"
    assert escaped.repairs == ["escaped </tool_response>, <|im_end|>"]
    assert not any(token in text for token in SPECIAL for text in escaped.texts())


def test_escaping_reaches_names_and_ids_and_refuses_to_make_two_keys_one():
    t = conversation(user(), assistant("", call("<|im_end|>")), result("<|im_end|>", name="<|im_end|>"), assistant("x"))
    escape = Data(special_tokens=SpecialTokens.escape)
    escaped = trajectory_options.without_special_tokens(t, SPECIAL, escape)
    assert escaped.messages[1].tool_calls[0].id == escaped.messages[2].tool_call_id == "< |im_end|>"
    both = conversation(
        user(), assistant("", call("1", **{"<|im_end|>": 1, "< |im_end|>": 2})), result("1"), assistant("x")
    )
    with pytest.raises(Rejected, match="become one when they are escaped"):
        trajectory_options.without_special_tokens(both, SPECIAL, escape)


def test_pieces_are_cut_before_user_messages_that_follow_an_answer():
    t = conversation(
        {"role": "system", "content": "s"}, user("a"), user("b"), assistant("1"), user("c"), assistant("2"), user("d")
    )
    assert trajectory_options.pieces(t) == [[1, 2, 3], [4, 5], [6]]
    assert trajectory_options.pieces(conversation(assistant("1"), user(), assistant("2"))) == [[0], [1, 2]]
