"""The remembering template renders what transformers renders, and the sandbox holds."""

import pytest

from data_prep.sources import read_trajectories
from data_prep.text.template import ChatTemplate
from data_prep.trajectory import Rejected
from tests.conftest import REPO
from tests.data_prep.support import OFFICIAL, assistant, call, conversation, official, result, user

TRAJECTORIES = list(read_trajectories(REPO / "data_prep" / "sample" / "train.jsonl", "limi"))


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_prompt_and_the_whole_equal_transformers(reference, name):
    chat = official(reference, name)
    for t in TRAJECTORIES[:6]:
        messages = t.chat()
        chat.template.forget()
        for k in range(1, len(messages) + 1):
            for prompt in (False, True):
                theirs = chat.tokenizer.apply_chat_template(
                    messages[:k], tools=t.tools, add_generation_prompt=prompt, tokenize=False
                )
                assert chat.template.render(messages[:k], t.tools, prompt=prompt) == theirs


@pytest.fixture
def template_of(bases):
    from data_prep.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(bases["qwen3-tiny"])

    def made(source):
        tokenizer.chat_template = source
        return ChatTemplate(tokenizer)

    return made


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__ }}",
        "{{ messages[0].__class__.__mro__ }}",
        "{{ messages[0].content.__class__ }}",
        "{% set ns = namespace(a=messages) %}{{ ns.a.append(1) }}",
        "{{ messages.append(1) }}",
        "{{ ''.format.__self__ }}",
        "{{ '{0.__class__}'.format(1) }}",
    ],
)
def test_the_sandbox_holds_the_second_time_too(template_of, source):
    template = template_of(source)
    for _ in range(2):
        try:
            assert template.render([user()], []) in ("", "{0.__class__}")
        except Rejected as error:
            assert "unsafe" in str(error) or "no attribute" in str(error)


def test_names_that_are_methods_of_a_dictionary_read_as_jinja_reads_them(template_of):
    """`call.items` is the method, even where the arguments hold a key of that name; `m.role` is the key."""
    template = template_of("{% for k, v in messages[0].x.items() %}{{ k }}={{ v }};{% endfor %}{{ messages[0].none }}")
    assert template.render([{"x": {"items": 1, "keys": 2}}], []) == "items=1;keys=2;"


def test_json_of_equal_objects_with_other_types_is_not_mixed_up(template_of):
    template = template_of("{% for m in messages %}{{ m.x | tojson }}{{ m.x | tojson(indent=1) }}{% endfor %}")
    assert template.render([{"x": {"a": 1}}, {"x": {"a": True}}, {"x": {"a": 1.0}}], []) == (
        '{"a": 1}{\n "a": 1\n}{"a": true}{\n "a": true\n}{"a": 1.0}{\n "a": 1.0\n}'
    )


def test_a_changed_trajectory_is_not_read_from_memory(reference):
    chat = official(reference, "qwen3")
    for value in ("first", "second"):
        trajectory = conversation(user(), assistant("", call("1", a=value)), result("1"), assistant("done"))
        (encoded,) = chat.encode(trajectory, [1, 3])
        assert value in chat.tokenizer.decode(encoded.tokens)


def test_two_namespaces_have_their_own_names(template_of):
    template = template_of(
        "{% set a = namespace(x=1) %}{{ a.x }}{{ a.x }}{% set b = namespace(y=2) %}{{ b.x is defined }}{{ b.y }}"
    )
    assert template.render([user()], []) == "11False2"


def test_json_options_reach_the_filter(template_of):
    template = template_of("{{ messages[0].x | tojson(true) }}{{ messages[0].x | tojson(separators=[',', ':']) }}")
    assert template.render([{"x": {"ü": [1, 2]}}], []) == '{"\\u00fc": [1, 2]}{"ü":[1,2]}'


@pytest.mark.parametrize("source", ["{{ 1 // 0 }}", "{{ messages[5].role }}", "{{ 'a' + 1 }}"])
def test_whatever_fails_in_a_template_rejects_the_record(template_of, source):
    with pytest.raises(Rejected, match="the chat template fails"):
        template_of(source).render([user()], [])
