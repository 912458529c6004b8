"""Every override that an error offers is typed: it is accepted, or what is wrong next is something else."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.compose.recipe import compose_recipe
from recipes.errors import ConfigError
from tests.recipes.offered import offered, with_words

MODELS = ["qwen3-tiny", "glm4.5-tiny"]
ONE = {
    "layout.tp": ["2", "3", "4", "8"], "layout.pp": ["2", "3", "8"], "layout.vpp": ["2", "3"], "layout.cp": ["2", "3"],
    "layout.ep": ["2", "3", "8"], "layout.etp": ["2", "3"], "layout.sp": ["true"], "layout.dp": ["1", "3"],
    "layout.first_stage_layers": ["1", "4"], "layout.recompute": ["linear"], "layout.offload": ["true"],
    "layout.optimizer_state": ["precision_aware"], "engine.dtype": ["fp32", "bf16"], "engine": ["slime"],
    "cluster.gpus_per_node": ["1", "3", "8"],
}  # fmt: skip
VALUES = [
    "optim.lr=0", "optim.batch_size=0", "optim.epochs=-1", "optim.min_lr_ratio=2", "optim.warmup_fraction=1", "step=0",
    "engine.spike=0.5", "engine.save_steps=0", "run=a/b", "cluster.root=x", "model.rope=yarn", "model.rope_factor=2",
    "gpu.memory_mib=0", "gpu.hour_price=-1", "layout.max_tokens_per_gpu=0", "sanity.min_tool_calls=2", "sanity.prompts=0",
]  # fmt: skip


def refused(words):
    try:
        compose_recipe(words)
    except ConfigError as error:
        return error
    return None


@pytest.mark.parametrize(
    ("model", "word"),
    [(model, f"{name}={value}") for model in MODELS for name, values in ONE.items() for value in values]
    + [(MODELS[0], word) for word in VALUES],
)
def test_what_is_offered_for_one_wrong_word_is_accepted(model, word):
    words = [f"model={model}", word]
    if (error := refused(words)) is None:
        return
    assert offered(error) or error.fix.startswith("leave"), error.fix
    for alternative in offered(error):
        assert refused(with_words(words, alternative)) is None, (error.fix, alternative)


@pytest.mark.run
@settings(deadline=None, max_examples=60)
@given(
    model=st.sampled_from(MODELS),
    words=st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in ONE.items()}),
)
def test_what_is_offered_mends_what_it_is_offered_for(model, words):
    words = [f"model={model}", *(f"{name}={value}" for name, value in words.items())]
    if (error := refused(words)) is not None:
        for alternative in offered(error):
            after = refused(with_words(words, alternative))
            assert after is None or after.problem != error.problem, (words, error.fix, alternative)
