"""The table of other frameworks' names: every advice in it can be typed."""

import re
import shlex

import pytest

from recipes.compose.names.foreign_names import FOREIGN
from recipes.compose.names.instead import foreign, instead
from recipes.compose.names.nearest import same_key
from recipes.compose.options import GROUPS, is_option, leaves
from recipes.compose.recipe import compose_recipe
from recipes.errors import ConfigError

NAMES = [(name, entry) for entry in FOREIGN for name in entry.names.split()]
ONCE = [(entry.names.split()[0], entry) for entry in FOREIGN]


def templates(entry):
    return [entry.write] if isinstance(entry.write, str) else list(entry.write.values())


def values(entry):
    """Values that `entry` has something to write for."""
    if isinstance(entry.write, str):
        return [entry.value] if entry.write else []
    return [{"": entry.value, "<1": "0.1"}.get(key, key) for key in entry.write]


def refused(word):
    with pytest.raises(ConfigError) as error:
        compose_recipe(["model=glm4.5", word])
    return error.value


def to_type(error):
    return shlex.split(error.fix.rpartition("write ")[2])


def test_the_names_are_many_and_each_is_there_once():
    names = [name for name, _ in NAMES]
    assert len(names) == len(set(names)) >= 60
    assert all(name == name.casefold().replace("-", "_") for name in names)


@pytest.mark.parametrize(("name", "entry"), NAMES)
def test_no_name_shadows_one_of_ours(name, entry):
    assert not is_option(name)
    ours = set() if "." in name else set(same_key(name, [*leaves(), *GROUPS]))
    written = {word.partition("=")[0] for template in templates(entry) for word in template.split()}
    assert not ours or ours & written, f"{name} is {ours} here, and the table says {written}"


@pytest.mark.parametrize(("name", "entry"), ONCE)
def test_every_option_that_is_named_is_there(name, entry):
    for text in (entry.note, *templates(entry)):
        for option in re.findall(rf"\b(?:{'|'.join(GROUPS)})\.\w+", text):
            assert option in leaves(), option
    assert entry.note or entry.write
    assert entry.note.rpartition("\n")[0] == ""


@pytest.mark.parametrize(("name", "entry"), ONCE)
def test_what_it_says_is_accepted(name, entry):
    for value in values(entry):
        error = refused(f"{name}={value}")
        words = to_type(error)
        assert words and all("=" in word for word in words), error
        compose_recipe(["model=glm4.5", *words])


@pytest.mark.parametrize(("name", "entry"), NAMES)
def test_a_name_is_known_however_it_is_written(name, entry):
    plain = instead(name, entry.value)
    dashed = name.replace("_", "-")
    forms = [dashed, f"--{name}", f"--{dashed}", f"—{name}", name.upper(), f"training.{name}", f"'{name}"]
    for form in [*forms, f"optim.{name}", f"layout.{name}", f"actor_rollout_ref.{name}"]:
        if not is_option(form):
            assert instead(form, entry.value) == plain, form


@pytest.mark.parametrize(
    ("word", "types"),
    [
        ("learning_rate=1e-5", ["optim.lr=1e-5"]),
        ("layout.tensor_parallel=2", ["layout.tp=2"]),
        ("num_train_epochs=3.0", ["optim.epochs=3"]),
        ("warmup_ratio=0.1", ["optim.warmup_fraction=0.1"]),
        ("warmup_steps=0.05", ["optim.warmup_fraction=0.05"]),
        ("warmup_steps=100", ["optim.warmup_steps=100"]),
        ("lr_scheduler_type=constant", ["optim.min_lr_ratio=1", "optim.warmup_steps=0"]),
        ("gradient_checkpointing=True", ["layout.recompute=full"]),
        ("gradient_checkpointing=no", ["layout.recompute=none"]),
        ("bf16=true", ["engine.dtype=bf16"]),
        ("bf16=false", ["engine.dtype=fp32"]),
        ("optimizer_cpu_offload=true", ["layout.optimizer_state=offloaded"]),
        ("model_name_or_path=Qwen/Qwen3-32B", ["model=qwen3-32b"]),
        ("base_model=/models/Qwen3-8B-sft", ["model=qwen3-8b", "model.checkpoint=/models/Qwen3-8B-sft"]),
        ("train_file=/my data/x.jsonl", ["data.path=/my data/x.jsonl"]),
        ("log_probs_chunk_size=-1", ["layout.loss_chunk=null"]),
        ("learnign_rate=1e-5", ["optim.lr=1e-5"]),
        ("learning_rate=1e−5", ["optim.lr=1e-5"]),
        ("learning_rate='2e-5'", ["optim.lr='2e-5'"]),
    ],
)
def test_the_value_is_converted(word, types):
    error = refused(word)
    assert error.problem == f"unknown option '{word.partition('=')[0]}'"
    assert to_type(error) == types
    compose_recipe(types)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("max_steps=10", "the number of steps follows from optim.epochs and optim.batch_size"),
        ("per_device_train_batch_size=1", "in micro-batches that are packed up to layout.max_tokens_per_gpu"),
        ("gradient_accumulation_steps=8", "write optim.batch_size=N"),
        ("lora_r=8", "every weight is trained, without adapters or quantization: leave it out"),
        ("lr_scheduler_type=cosine", "the one schedule is a warm-up and a cosine down to"),
        ("lr_scheduler_type=linear", "the one schedule is a warm-up and a cosine down to"),
        ("min_lr=1e-6", "for 1e-6 of optim.lr=1e-5 write optim.min_lr_ratio=0.1"),
    ],
)
def test_where_nothing_is_the_same_a_sentence_says_so(word, says):
    assert says in refused(word).fix


def test_the_table_is_asked_by_the_longest_name():
    assert foreign("actor_rollout_ref.model.path").write == "model={}"
    assert foreign("sanity.path") is None
