import json
import shutil
from pathlib import Path

import pytest

from data_prep.files import sha256
from data_prep.pack import dataset
from data_prep.pack import pack as packing
from data_prep.pack.dataset import open_dataset, overlap, prepare, repeated
from recipes.config import SpecialTokens, TooLong, Turns
from recipes.errors import DataError
from recipes.paths import REPO
from tests.data_prep.support import TOOL, assistant, call, result, user
from tests.launch.support import recipe_of


@pytest.fixture
def fresh(root, tmp_path):
    """A recipe whose data sets go to a folder of its own, and a writer of sources."""
    recipe, data, _ = recipe_of(root, f"data.out={tmp_path}/out")

    def source(*records):
        path = tmp_path / "source.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
        return str(path)

    return recipe, source


def record(*messages, **more):
    return {"messages": [*messages], "tools": [TOOL], **more}


def lines(data, name):
    return [json.loads(line) for line in (data.folder / name).read_text().splitlines()]


def test_the_data_set_holds_every_record_and_its_manifest_says_how(root):
    recipe, data, _ = recipe_of(root)
    counts = data.manifest["counts"]
    assert counts["records"] == counts["kept"] == counts["sequences"] == len(data.ids) == 20
    assert counts["tokens"] == sum(data.lengths) == sum(len(data.tokens(i)) for i in range(20))
    assert counts["supervised"] == sum(data.supervised)
    assert [sum(e - s for s, e in data.spans(i)) for i in range(20)] == data.supervised
    assert "every supervised turn" in data.manifest["proof"]
    assert [line["id"] for line in data.ledger()] == data.ids
    assert (data.folder / "lengths.svg").read_text().startswith("<?xml")


def test_conversations_say_what_each_span_is(root):
    _, data, _ = recipe_of(root)
    for row, shown in enumerate(data.conversations()):
        (sequence,) = shown["sequences"]
        starts = [start for start, _ in data.spans(row)]
        assert [prompt for _, prompt in sequence["turns"]] == starts
        assert all(shown["messages"][k]["role"] == "assistant" for k, _ in sequence["turns"])


@pytest.mark.run
def test_preparing_again_is_a_cache_hit_and_other_options_are_not(root):
    recipe, data, _ = recipe_of(root)
    before = (data.folder / "manifest.json").stat().st_mtime_ns
    recipe.data.workers, recipe.data.max_rejected = 2, 7
    assert prepare(recipe, recipe.data.path).folder == data.folder
    assert (data.folder / "manifest.json").stat().st_mtime_ns == before
    recipe.data.turns = Turns.last_segment
    other = prepare(recipe, recipe.data.path)
    assert other.folder != data.folder
    assert 0 < other.manifest["counts"]["supervised"] < data.manifest["counts"]["supervised"]


@pytest.mark.parametrize(
    "path",
    [
        "recipes/families/qwen3.py",
        "data_prep/text/template.py",
        "data_prep/text/chat.py",
        "data_prep/sources/limi.py",
        "data_prep/trajectory.py",
        "data_prep/pack/trajectory_options.py",
    ],
)
def test_a_change_of_whatever_makes_the_text_makes_it_anew(fresh, tmp_path, monkeypatch, path):
    recipe, source = fresh
    checkout = tmp_path / "checkout"
    for folder in ("data_prep", "recipes"):
        shutil.copytree(REPO / folder, checkout / folder, ignore=shutil.ignore_patterns("*.jsonl", "__pycache__"))
    monkeypatch.setattr(dataset, "REPO", checkout)
    given = source(record(user(), assistant("1"), id="one"))
    before = prepare(recipe, given)
    assert prepare(recipe, given).folder == before.folder
    with (checkout / path).open("a", encoding="utf-8") as file:
        file.write("\n")
    assert prepare(recipe, given).folder != before.folder


def test_two_processes_write_what_one_writes(fresh):
    recipe, _ = fresh
    recipe.data.workers = 1
    one = {name: sha256(prepare(recipe, recipe.data.path).folder / name) for name in packing.FILES}
    recipe.data.workers, recipe.data.out = 2, f"{recipe.data.out}2"
    assert {name: sha256(prepare(recipe, recipe.data.path).folder / name) for name in packing.FILES} == one


def test_every_rejection_is_listed_counted_and_in_the_ledger(fresh):
    recipe, source = fresh
    path = source(record(user(), assistant("1"), id="good"), record(user(), id="bad"), 5)
    with pytest.raises(DataError) as error:
        prepare(recipe, path)
    said = str(error.value)
    assert "2 of 3 records" in said and "data.max_rejected=0 allows 0" in said and "write data.max_rejected=2" in said
    assert "line 2 bad: no_supervised: no assistant turn" in said
    assert "line 3: shape: a record is a JSON object, this is int" in said
    recipe.data.max_rejected = 2
    data = prepare(recipe, path)
    assert data.ids == ["good"]
    counts = data.manifest["counts"]
    assert (counts["records"], counts["kept"], counts["rejected"]) == (3, 1, 2)
    assert [line["status"] for line in data.ledger()] == ["kept", "rejected", "rejected"]
    assert [line.get("code") for line in data.ledger()] == [None, "no_supervised", "shape"]


def test_nothing_kept_is_an_error_whatever_may_be_rejected(fresh):
    recipe, source = fresh
    recipe.data.max_rejected = 100
    with pytest.raises(DataError, match="and none is left"):
        prepare(recipe, source(record(user())))
    with pytest.raises(DataError, match="holds no trajectory"):
        prepare(recipe, source())


def test_too_long_is_rejected_by_name_or_cut_before_user_messages(fresh):
    recipe, source = fresh
    words = "some words " * 40
    path = source(
        record(
            {"role": "system", "content": "s"},
            *[m for n in range(4) for m in (user(f"{n} {words}"), assistant(f"{n}"))],
            id="long",
        )
    )
    whole = prepare(recipe, path)
    recipe.data.max_tokens = whole.lengths[0] * 2 // 3
    with pytest.raises(
        DataError, match=rf"long: too_long: .*write data\.max_tokens={whole.lengths[0]}, or data\.too_long=split"
    ):
        prepare(recipe, path)
    recipe.data.too_long = TooLong.split
    cut = prepare(recipe, path)
    assert cut.ids == ["long", "long"] and cut.segments == [0, 1] and cut.trajectory == [0, 0]
    assert max(cut.lengths) <= recipe.data.max_tokens
    assert sum(cut.supervised) == sum(whole.supervised), "every turn is still supervised once"
    assert [c["messages"][0]["role"] for c in cut.conversations()] == ["system", "system"]
    (line,) = cut.ledger()
    assert (line["pieces"], line["segments"], line["turns"]) == (2, 2, 4)
    recipe.data.max_tokens = whole.lengths[0] // 10
    with pytest.raises(DataError, match="is cut before user messages only"):
        prepare(recipe, path)


def test_reasoning_makes_segments_and_the_ledger_says_why(fresh):
    recipe, source = fresh
    path = source(
        record(user(), assistant("1", reasoning_content="a"), user(), assistant("2", reasoning_content="b"), id="r")
    )
    data = prepare(recipe, path)
    assert data.segments == [0, 1] and data.trajectory == [0, 0]
    (line,) = data.ledger()
    assert (line["segments"], line["segments_by_history"]) == (2, 1)


def test_copies_are_kept_and_named(fresh):
    recipe, source = fresh
    one, other = record(user(), assistant("1")), record(user("else"), assistant("1"))
    data = prepare(recipe, source(one, {**one, "id": "mine"}, one, other, one))
    first = data.ids[0]
    assert data.ids == [first, "mine", f"{first}.2", data.ids[3], f"{first}.3"]
    assert repeated(data) == [("mine", first), (f"{first}.2", first), (f"{first}.3", first)]
    held = prepare(recipe, source(record(user("third"), assistant("1")), {**other, "id": "h"}))
    assert overlap(held, data) == [("h", data.ids[3])]


def test_a_copy_of_a_record_with_an_id_and_two_without(fresh):
    recipe, source = fresh
    one = record(user(), assistant("1"))
    data = prepare(recipe, source({**one, "id": "a"}, one, one))
    made = data.ids[1]
    assert data.ids == ["a", made, f"{made}.2"] and repeated(data) == [(made, "a"), (f"{made}.2", "a")]


def test_a_rejected_id_names_no_content(fresh):
    recipe, source = fresh
    recipe.data.max_rejected = 1
    other = record(user("else"), assistant("1"))
    data = prepare(recipe, source(record(user(), assistant("1"), id="a"), {**other, "id": "a"}, {**other, "id": "c"}))
    assert data.ids == ["a", "c"] and repeated(data) == []


def test_what_cutting_leaves_out_is_named(fresh):
    recipe, source = fresh
    words = "some words " * 40
    path = source(record(*[m for n in range(4) for m in (user(f"{n} {words}"), assistant(f"{n}"))], id="long"))
    recipe.data.turns, recipe.data.too_long = Turns.last_segment, TooLong.split
    recipe.data.max_tokens = prepare(recipe, path).lengths[0] * 2 // 3
    data = prepare(recipe, path)
    (line,) = data.ledger()
    assert line["repairs"] == ["messages 0 to 3, none supervised, left out by the cutting"]
    (shown,) = data.conversations()
    assert [m["content"] for m in shown["messages"][1::2]] == ["2", "3"], "what fits before it is its context"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_wrong_checkpoint_says_so_however_many_work(fresh, tmp_path, workers):
    recipe, _ = fresh
    recipe.data.workers, recipe.model.checkpoint = workers, str(tmp_path)
    with pytest.raises(DataError, match="no tokenizer.json"):
        prepare(recipe, recipe.data.path)


def test_escaping_is_named_in_the_ledger(fresh):
    recipe, source = fresh
    recipe.data.special_tokens = SpecialTokens.escape
    data = prepare(
        recipe, source(record(user(), assistant("", call("1")), result("1", "a<|im_end|>b"), assistant("x")))
    )
    (line,) = data.ledger()
    assert line["repairs"] == ["escaped <|im_end|>"]


def test_results_in_another_order_than_their_calls_are_counted(fresh):
    recipe, source = fresh
    calls = assistant("", call("1"), call("2"))
    data = prepare(recipe, source(record(user(), calls, result("2"), result("1"), assistant("x"))))
    assert next(data.ledger())["turns_with_results_reordered"] == 1


def test_a_folder_that_cannot_be_written_is_named(fresh, tmp_path):
    """By the system; `recipes/compose/os_errors.py` adds the option."""
    recipe, _ = fresh
    recipe.data.out = str(tmp_path / "source.jsonl" / "x")
    (tmp_path / "source.jsonl").write_text("")
    with pytest.raises(NotADirectoryError) as error:
        prepare(recipe, recipe.data.path)
    assert error.value.filename == recipe.data.out


def test_messages_name_the_option_that_gave_the_path(fresh, tmp_path):
    recipe, source = fresh
    with pytest.raises(DataError, match=r"write data\.heldout=FILE"):
        prepare(recipe, str(tmp_path / "none"), "data.heldout")
    with pytest.raises(DataError, match=r"records of 'data\.heldout="):
        prepare(recipe, source(record(user())), "data.heldout")


def test_messages_after_the_last_turn_are_counted(fresh):
    recipe, source = fresh
    data = prepare(recipe, source(record(user(), assistant("1"), user(), user())))
    assert next(data.ledger())["messages_after_the_last_turn"] == 2


def test_a_failure_leaves_nothing_behind(fresh, monkeypatch):
    recipe, source = fresh
    made = set(Path(recipe.data.out).iterdir())

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing.pq.ParquetWriter, "write_table", fail)
    with pytest.raises(OSError):
        prepare(recipe, source(record(user(), assistant("1"))))
    assert set(Path(recipe.data.out).iterdir()) == made


def test_a_changed_or_missing_file_is_found(fresh):
    recipe, _ = fresh
    data = prepare(recipe, recipe.data.path)
    with (data.folder / "sequences.parquet").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match="not the file its manifest names"):
        open_dataset(data.folder)
    (data.folder / "sequences.parquet").unlink()
    with pytest.raises(DataError, match="not the file its manifest names"):
        prepare(recipe, recipe.data.path)
