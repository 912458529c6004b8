import io
from pathlib import Path

import pytest
from rich.console import Console

from data_prep.pack import show
from data_prep.pack.dataset import prepare
from data_prep.text.tokenizer import load_tokenizer
from recipes.errors import ConfigError
from tests.launch.support import recipe_of


@pytest.fixture(params=["qwen3-tiny", "glm4.5-tiny"])
def shown(request, root):
    recipe, data, held = recipe_of(root, f"model={request.param}")
    return recipe, data, load_tokenizer(Path(recipe.model.checkpoint))


def printed(recipe, data, **options):
    console = Console(file=io.StringIO(), width=200, **options)
    show.sequences(data, recipe, console)
    return console.file.getvalue()


def test_blocks_are_the_whole_sequence(shown):
    recipe, data, tokenizer = shown
    for row in range(len(data.ids)):
        blocks = list(show.blocks(data, row, tokenizer, recipe))
        assert "".join(text for b in blocks for text, *_ in b.pieces) == tokenizer.decode(data.tokens(row).tolist())
        assert sum(n for b in blocks for *_, n in b.pieces) == data.lengths[row]
        assert sum(b.supervised for b in blocks) == data.supervised[row]
        assert sum(b.supervised > 0 for b in blocks) == len(data.spans(row))


def test_roles_and_message_numbers(shown):
    recipe, data, tokenizer = shown
    titles = [b.title for b in show.blocks(data, 0, tokenizer, recipe)]
    assert "assistant, message 2" in titles and "assistant, message 5" in titles and "user" in titles


def test_supervised_text_is_coloured_or_in_brackets(shown):
    recipe, data, tokenizer = shown
    recipe.id = data.ids[0]
    plain = printed(recipe, data)
    _, _, text = plain.partition("supervised text is in ⟦ ⟧")
    assert "I read it." in text[text.index("⟦") : text.index("⟧")]
    assert "tokens not shown" in plain
    coloured = printed(recipe, data, force_terminal=True)
    assert "\x1b[32m" in coloured and "⟦" not in coloured


def test_a_page_marks_what_is_supervised(shown):
    recipe, data, tokenizer = shown
    page = show.page(data, 0, tokenizer, recipe)
    assert page.count("<mark>") == len(data.spans(0))
    assert "&lt;" in page and "<|" not in page.replace("&lt;|", "")


def test_a_listing_and_an_unknown_id(shown):
    recipe, data, _ = shown
    assert show.listing("training", data).row_count == 20
    with pytest.raises(ConfigError, match=rf"the nearest is id={data.ids[0]}"):
        show.refuse_unknown(data.ids[0][:-1], {"training": data})
    with pytest.raises(ConfigError, match="no trajectory has id=no-such-id; leave id out for a list$"):
        show.refuse_unknown("no-such-id", {"training": data})


def test_a_rejected_id_says_why(root, tmp_path):
    recipe, _, _ = recipe_of(root, f"data.out={tmp_path}")
    path = tmp_path / "x.jsonl"
    path.write_text(
        '{"id": "a", "messages": [{"role": "user", "content": ""}], "tools": []}\n' + Path(recipe.data.path).read_text()
    )
    recipe.data.max_rejected = 1
    with pytest.raises(ConfigError, match=r"line 1.* was rejected: no_supervised|id=a was rejected"):
        show.refuse_unknown("a", {"training": prepare(recipe, str(path))})


def test_control_characters_are_shown_and_not_obeyed(root):
    """By the text of a sequence, by ids, and by lists of errors."""
    assert show.visible("a\x1b[2J\tb\nc\u202ed \x07") == "a\\x1b[2J\tb\nc\\u202ed \\x07"
    recipe, data, _ = recipe_of(root, "model=qwen3-tiny")
    console = Console(file=io.StringIO(), width=200)
    data.ids[0] = recipe.id = "wild\x1b[2J"
    show.sequences(data, recipe, console)
    assert "\x1b" not in console.file.getvalue() and "wild\\x1b[2J" in console.file.getvalue()
