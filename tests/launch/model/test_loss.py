"""Cross entropy in chunks is the plain one, in value and every gradient, and holds no softmax."""

import pytest
import torch

from tests.launch.one_rank import gradients_of, model_of
from tests.launch.support import recipe_of

TOKENS, VOCABULARY = 1000, 768


def step(words, tokens, labels, supervised):
    """Losses, gradients, and bytes of the largest tensor that was saved for the backward pass."""
    from launch.model.attention import packed_of

    recipe, chunk = model_of(words)
    packed = packed_of(recipe.model, [TOKENS], torch.device("cpu"))
    largest = 0

    def pack(tensor):
        nonlocal largest
        largest = max(largest, tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        losses = chunk(tokens, None, None, labels=labels, packed_seq_params=packed)
    (losses * supervised).sum().backward()
    return losses.detach(), gradients_of(chunk), largest


@pytest.mark.run
@pytest.mark.parametrize(
    "words",
    [
        ["model=qwen3-tiny"],
        ["model=qwen3-tiny", "model.tied=false"],
        ["model=glm4.5-tiny", "layout.ep=1"],
    ],
)
def test_the_loss_in_chunks_is_the_plain_one_in_value_and_gradient(root, megatron, words):
    name = "-".join(words).translate(str.maketrans("=.", "--"))
    recipe, _, _ = recipe_of(root, *words, f"model.checkpoint={root}/models/loss-{name}")
    words = [*words, f"model.checkpoint={recipe.model.checkpoint}", "cluster.gpus_per_node=1"]
    torch.manual_seed(0)
    batch = [*torch.randint(0, 700, (2, 1, TOKENS)), torch.rand(1, TOKENS)]
    losses, gradients, largest = step(words, *batch)
    assert largest >= 4 * TOKENS * VOCABULARY, "the plain one holds the softmax"
    for size in (1, 64, 999, 1000, 5000):
        mine, own, held = step([*words, f"layout.loss_chunk={size}"], *batch)
        assert mine.shape == losses.shape == (1, TOKENS) and mine.dtype == losses.dtype == torch.float32
        assert torch.allclose(mine, losses, rtol=0, atol=2e-6), size
        assert own.keys() == gradients.keys()
        for parameter, gradient in gradients.items():
            assert (own[parameter] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, (size, parameter)
        assert held < 4 * TOKENS * VOCABULARY, (size, held)
