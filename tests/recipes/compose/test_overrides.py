"""Words as they are typed wrong: each is refused with the word, what is wrong, and what to type."""

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recipes.compose.options import NAMES, override
from recipes.compose.overrides import checked
from recipes.compose.recipe import compose_recipe
from recipes.errors import ConfigError

MODELS = "glm4.5, glm4.5-air, glm4.5-tiny, qwen3-14b, qwen3-32b, qwen3-4b, qwen3-8b, qwen3-tiny"
TWO = "each a word of its own, without quotes around them all"


def read(word):
    return OverridesParser.create().parse_override(word).value()


@pytest.mark.parametrize(
    ("word", "problem", "fix"),
    [
        # Several words in one, spaces, comments, line breaks
        ("optim.lr=1e-5 optim.epochs=2", "'{}' is 2 words in one", f"write optim.lr=1e-5 optim.epochs=2, {TWO}"),
        ("run=a model=qwen3-4b", "'{}' is 2 words in one", f"write run=a model=qwen3-4b, {TWO}"),
        ("lr=1e-5 num_epochs=2", "'{}' is 2 words in one", f"write lr=1e-5 num_epochs=2, {TWO}"),
        ("optim.lr=1\nseed=2", r"'optim.lr=1\nseed=2' is 2 words in one", f"write optim.lr=1 seed=2, {TWO}"),
        ("optim.lr = 1e-5", "'{}' has a space beside its '='", "write optim.lr=1e-5"),
        ("optim.lr= 1e-5", "{} is not a number", "write optim.lr=1e-5"),
        ("optim.lr:1e-5", "'{}' is not name=value", "write optim.lr=1e-5"),
        ("optim.lr", "'{}' is not name=value", "write optim.lr=X, a number"),
        ("optim.lr=1e-5 # slow", "{} is not a number", "write optim.lr=1e-5"),
        ("optim.lr=1e-5\r", r"'optim.lr=1e-5\r' has a line break or another control character in it", "write optim.lr=1e-5"),
        ("data.path=/x\r", r"'data.path=/x\r' has a line break or another control character in it", "write data.path=/x"),
        ("run=a\nb", r"run='a\nb': a run's name is 1 to 100 letters, digits, '.', '_' and '-'", "write run=my-run"),
        # Lists
        (
            "optim.lr=1e-5,2e-5",
            "{} lists 2 values, and a run takes one",
            "write sweep=optim.lr=1e-5,2e-5, which runs one after the other, each under a name of its own",
        ),
        (
            "layout.recompute=[none, full]",
            "{} lists 2 values, and a run takes one",
            "write sweep=layout.recompute=none,full, which runs one after the other, each under a name of its own",
        ),
        (
            "data.max_tokens=131,072",
            "{} lists 2 values, and a run takes one",
            "write data.max_tokens=131072 for one number, or write sweep=data.max_tokens=131,072, which runs one after the other, "
            "each under a name of its own",
        ),
        ("optim.lr=1e-5,fast", "{} is not a number", "write optim.lr=X, a number"),
        ("optim.lr=1e-5,", "{} is not a number", "write optim.lr=1e-5"),
        # Numbers, flags, choices
        ("optim.lr=", "optim.lr='' is empty", "leave optim.lr out, or write optim.lr=X, a number"),
        ("optim.lr=abc", "{} is not a number", "write optim.lr=X, a number"),
        ("optim.lr=[1e-5", "{} is not a number", "write optim.lr=1e-5"),
        ("optim.lr=1e−5", "{} is not a number: its minus sign (U+2212) is not a keyboard's", "write optim.lr=1e-5"),
        ("optim.weight_decay=10%", "{} is not a number", "write optim.weight_decay=0.1"),
        ("optim.epochs=1.5", "{} is not a whole number", "write optim.epochs=1 or optim.epochs=2"),
        ("optim.epochs=2.0", "{} is not a whole number", "write optim.epochs=2"),
        ("optim.warmup_steps=0.1", "{} is not a whole number", "write optim.warmup_steps=N, a whole number"),
        ("data.max_tokens=128k", "{} is not a whole number", "write data.max_tokens=128000 or data.max_tokens=131072"),
        ("data.max_tokens=131 072", "{} is not a whole number", "write data.max_tokens=131072"),
        ("data.max_tokens=" + "9" * 5000, "{} is not a whole number", "write data.max_tokens=N, a whole number"),
        ("dry_run=2", "{} is not true or false", "write dry_run=true or dry_run=false"),
        ("dry_run=ture", "{} is not true or false", "write dry_run=true"),
        ("dry_run=", "dry_run='' is empty", "leave dry_run out, or write dry_run=true or dry_run=false"),
        ("layout.recompute=FULL", "{} is none of none, selective, linear, full", "write layout.recompute=full"),
        ("engine.dtype=fp16", "{} is none of fp32, bf16", "write engine.dtype=CHOICE, one of them"),
        ("optim.warmup_fraction=None", "{}: an option without a value is null", "write optim.warmup_fraction=null"),
        ("data.heldout=", "data.heldout='' is empty", "leave data.heldout out, or write data.heldout=null"),
        ("data.path=null", "{}: this option has a value", "leave data.path out, or write data.path=TEXT"),
        # Groups
        ("model=", f"model='' is empty (known: {MODELS})", "write model=NAME, one of them"),
        ("model=Qwen3-32B", f"unknown model 'Qwen3-32B' (known: {MODELS})", "write model=qwen3-32b"),
        ("model=Qwen/Qwen3-32B", f"unknown model 'Qwen/Qwen3-32B' (known: {MODELS})", "write model=qwen3-32b"),
        ("model=qwen3-33b", f"unknown model 'qwen3-33b' (known: {MODELS})", "write model=qwen3-32b"),
        ("model=llama", f"unknown model 'llama' (known: {MODELS})", "write model=NAME, one of them"),
        (
            "model=/m/GLM-4.5-Air-ft",
            f"unknown model '/m/GLM-4.5-Air-ft' (known: {MODELS})",
            "write model=glm4.5-air model.checkpoint=/m/GLM-4.5-Air-ft",
        ),
        (
            "model=acme/agent",
            f"unknown model 'acme/agent' (known: {MODELS})",
            "write model=NAME model.checkpoint=acme/agent, NAME being one with its dimensions",
        ),
        (
            "data=my.jsonl",
            "unknown data 'my.jsonl' (known: auto, claude_code, limi, openai, requests, sample, sii_cli, trajectory)",
            "write data=NAME data.path=my.jsonl, NAME being the form it has",
        ),
        ("gpu=b200", "unknown gpu 'b200' (known: a100, cpu, h100, h200)", "write gpu=NAME, one of them"),
        (
            "model=qwen3-32b,qwen3-4b",
            "{} lists 2 values, and a run takes one",
            "write sweep=model=qwen3-32b,qwen3-4b, which runs one after the other, each under a name of its own",
        ),
        # Names
        ("--lr=1e-5", "unknown option '--lr'", "here it is 'optim.lr': write optim.lr=1e-5"),
        ("–lr=1e-5", "unknown option '–lr'", "here it is 'optim.lr': write optim.lr=1e-5"),
        ("“optim.lr=1e-5”", "unknown option '“optim.lr'", "write optim.lr=1e-5"),
        ("“data.path=/x”", "unknown option '“data.path'", "write data.path=/x"),
        ("--optim.lr=1e-5", "unknown option '--optim.lr'", "write optim.lr=1e-5"),
        ("LR=1e-5", "unknown option 'LR'", "here it is 'optim.lr': write optim.lr=1e-5"),
        ("train.epohcs=3", "unknown option 'train.epohcs'", "the nearest is 'optim.epochs': write optim.epochs=3"),
        ("seeed=", "unknown option 'seeed'", "the nearest is 'seed': write seed=N, a whole number"),
        (
            "timeout=5",
            "unknown option 'timeout'",
            "write one of gpu.timeout=5, engine.timeout=5, sanity.timeout=5",
        ),
        (
            "cluster.foo=5",
            "unknown option 'cluster.foo'",
            "the options of cluster. are name, nodes, gpus_per_node, cpus_per_node, host_memory_gb, network_gb_s, disk_gb_s, root, "
            "address, rdma_resource, host_network, "
            "interface, env",
        ),
        (
            "foo=5",
            "unknown option 'foo'",
            "options are run, seed, dry_run, anew, limit_s, smoke, id, html, checkpoint, step, and those of the groups cluster, data, "
            "engine, experiment, gpu, layout, model, optim, sanity: model=qwen3-4b, optim.lr=1e-5",
        ),
        ("HF_TOKEN=abc", "unknown option 'HF_TOKEN'",
         "a variable of the environment stands before the command: HF_TOKEN=... make ..."),
        ("cluster.evn.A=1", "unknown option 'cluster.evn.A'", "the nearest is 'cluster.env.A': write cluster.env.A=1"),
        ("cluster.env.A B=1", "'A B' is no name in cluster.env", "write cluster.env.NAME=1"),
        ("cluster.env={A:1}", "cluster.env holds a value for each name", "write cluster.env.NAME=VALUE"),
        # Interpolations
        *(
            (
                word,
                f"{word}: ${{...}} in it names nothing that has a value",
                "write the value itself, ${optim.lr} for that of an option, or ${oc.env:NAME} for a variable of the environment",
            )
            for word in ("optim.lr=${optim.lrr}", "run=${run}", "data.path=${run", "run=${oc.env:LIMI_NOT_SET}")
        ),
    ],
)  # fmt: skip
def test_a_wrong_word_is_refused(word, problem, fix):
    with pytest.raises(ConfigError) as error:
        compose_recipe([word])
    assert error.value.problem == problem.replace("{}", word)
    assert error.value.fix == fix


@pytest.mark.parametrize("word", ["model=qwen3-4b", "data.path=/x", "data.heldout=null", "cluster.interface=eth0", "dry_run=YES",
    "optim.lr=2E-5", "optim.lr=.00001", "optim.lr='1e-5'", "optim.epochs=1_000", "cluster.env.X=", "run='first'",
    "data.path=/two\nlines", "optim.warmup_steps=${optim.epochs}", "data.path=${run}/a b,c=d", "data.path=C:\\", "data.path='a\\'b'",
])  # fmt: skip
def test_a_right_word_is_taken(word):
    compose_recipe([word])


def test_advice_on_a_list_is_the_whole_command_with_a_run_of_its_own_each():
    with pytest.raises(ConfigError) as error:
        checked(["run=try", "optim.lr=1e-5,2e-5", "data.path=/my data"], "plan")
    first, second = error.value.fix.removeprefix("run one after the other: ").split(" && ")
    assert first == "make plan 'data.path=/my data' optim.lr=1e-5 run=try-lr-1e-5"
    made = [compose_recipe(shlex.split(command)[2:]) for command in (first, second)]
    assert [r.optim.lr for r in made] == [1e-5, 2e-5]
    assert [r.run for r in made] == ["try-lr-1e-5", "try-lr-2e-5"]


@pytest.mark.parametrize("option", [name for name, kind in NAMES.items() if kind in (str, str | None)])
def test_text_with_commas_and_equals_signs_is_text(option):
    assert read(override(option, "/a,b/x=1 y=[2]/{z}")) == "/a,b/x=1 y=[2]/{z}"


@given(
    st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=12)
    | st.text("\\'\"a=, #[${", min_size=1, max_size=8)
)
@example("\\")
@example("'\\'")
@example("a\\'")
def test_text_reaches_hydra_as_typed(text):
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if "${" not in text and not quoted and text.casefold() != "null":
        assert read(override("data.path", text)) == text


@given(
    name=st.sampled_from(["optim.lr", "optim.epochs", "dry_run", "layout.recompute", "data.path", "model", "data.heldout",
                          "cluster.env.A", "cluster.env", "optim.lrr", "learning_rate", "warmup_steps", "bf16", "", "foo"]),
    before=st.text("-+~ –\"“", max_size=2),
    equals=st.sampled_from(["=", " = ", ":", "", "＝"]),
    value=st.text(max_size=6) | st.text("0123456789.,e-+kM%[](){}'\" #=$\n", max_size=10),
)  # fmt: skip
@settings(max_examples=500, deadline=None)
def test_no_word_ends_otherwise_than_in_our_words(name, before, equals, value):
    try:
        for word in checked([before + name + equals + value], "train"):
            read(word)  # Hydra's grammar takes every word that is not refused
    except ConfigError as error:
        assert error.fix
        assert str(error).isprintable()
