from recipes.compose import commands
from recipes.compose.recipe import compose_recipe
from recipes.paths import REPO


def test_the_same_words_are_typed_again_and_other_machines_take_the_place_of_theirs():
    r = compose_recipe(["model=qwen3-4b", "cluster=h100x8", "layout.tp=2", "cluster.root=/a b"])
    assert commands.of_words("fetch", r) == "make fetch MODEL=qwen3-4b cluster=h100x8 layout.tp=2 'cluster.root=/a b'"
    assert commands.of_words("plan", r, "h200x1") == "make plan MODEL=qwen3-4b 'cluster.root=/a b' cluster=h200x1"


def test_a_run_is_found_where_it_lies():
    r = compose_recipe(["run=one", "cluster.root=/a b", "cluster.address=http://h:8265"])
    place = "'cluster.root=/a b' cluster.address=http://h:8265"
    assert commands.of_run("sanity", r, "sanity.prompts=3") == f"make sanity run=one sanity.prompts=3 {place}"
    assert commands.of_place("serve", r, "checkpoint=/x") == f"make serve checkpoint=/x {place}"
    assert commands.of_run("export", compose_recipe(["run=one", f"cluster.root={REPO}"])) == "make export run=one"
