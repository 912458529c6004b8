from recipes.compose.names.nearest import misspelt, nearest, same_key
from recipes.compose.options import GROUPS, NAMES, choices

OPTIONS = [*NAMES, *GROUPS]


def test_case_separators_and_a_slip_or_two_are_found():
    for word in ("train", "TRAIN", " train ", "trian", "trin", "traain", "trayn", "rtaim"):
        assert nearest(word, ["train", "plan", "data", "serve"]) == "train", word
    assert nearest("bench_gpu", ["bench", "bench-gpu"]) == "bench-gpu"
    assert nearest("QWEN3_32B", choices("model")) == "qwen3-32b"


def test_nothing_is_near_that_takes_more_slips_than_its_length_allows():
    assert nearest("save", ["serve"]) == "serve", "two slips of five letters"
    assert nearest("plot", ["data"]) is None
    assert nearest("plxx", ["plan"]) is None, "two slips of four letters"
    assert nearest("lt", ["lr"]) is None, "one of two"
    assert nearest("", ["lr"]) is None and nearest("x", []) is None


def test_another_number_is_another_thing():
    for group, word in (
        ("cluster", "h100x16"),
        ("cluster", "a100x8"),
        ("gpu", "b200"),
        ("gpu", "a10"),
        ("model", "glm4.6"),
    ):
        assert nearest(word, choices(group)) is None, word
    assert nearest("qwen4-tiny", choices("model")) == "qwen3-tiny", "the rest says what was meant"


def test_of_two_that_are_equally_near_neither_is_named():
    assert nearest("modes", ["nodes", "model"]) is None
    assert nearest("h100x", ["h100x1", "h100x8"]) is None
    assert misspelt("layout.tpp", OPTIONS) == misspelt("layout.xp", OPTIONS) == []


def test_options_are_found_with_and_without_their_group():
    for word in ("optim.lrr", "optm.lr", "optim.lt", "lrr", "OPTIM.LRR"):
        assert misspelt(word, OPTIONS) == ["optim.lr"], word
    assert misspelt("max_token", OPTIONS) == ["data.max_tokens"]
    assert misspelt("MODLE", OPTIONS) == ["model"]
    assert misspelt("cluster.gpu-per-node", OPTIONS) == ["cluster.gpus_per_node"]
    assert same_key("training.batch_size", OPTIONS) == ["optim.batch_size"]


def test_a_name_that_several_groups_have_is_not_decided():
    three = ["gpu.timeout", "engine.timeout", "sanity.timeout"]
    assert same_key("timeout", OPTIONS) == misspelt("timeot", OPTIONS) == three


def test_names_that_only_look_alike_are_not_near():
    for word in ("learning_rate", "layout.tensor_parallel", "max_steps", "layout.foo", "optim.xy", "data.rate", "foo"):
        assert misspelt(word, OPTIONS) == [], word


def test_no_option_leads_to_another():
    for option in OPTIONS:
        assert misspelt(option, OPTIONS) == (["checkpoint", "model.checkpoint"] if option == "checkpoint" else [option])
