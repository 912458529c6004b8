"""Megatron in the test process, as one rank on the CPU. Its modules are imported through the hook: ask for the fixture `megatron`, and
import them, and those of `launch.model` that import them, in the test."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.megatron import cpu
from recipes.compose.recipe import compose_recipe
from recipes.config import Recipe


@contextmanager
def one_rank() -> Iterator[None]:
    """This process as a rank of one."""
    cpu.install()
    from megatron.core import parallel_state, tensor_parallel

    dist.init_process_group("gloo", store=dist.HashStore(), world_size=1, rank=0)  # type: ignore[attr-defined]
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(0, inference_rng_tracker=True)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def model_of(words: Sequence[str]) -> tuple[Recipe, Any]:
    """A recipe, and its model with the weights of its base."""
    from launch.model.gpt import build_chunks, transformer_config
    from launch.weights import hf_names
    from launch.weights.safetensors_folder import SafetensorsFolder

    recipe = compose_recipe(words)
    (chunk,) = build_chunks(recipe, transformer_config(recipe))
    hf_names.load([chunk], recipe.model, SafetensorsFolder(Path(recipe.model.checkpoint)).read)
    return recipe, chunk


def gradients_of(chunk: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in chunk.named_parameters() if p.grad is not None}


def logits_of(words: Sequence[str], sequences: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Of every token, sequence by sequence, which the model takes packed into one micro-batch."""
    from launch.model.attention import packed_of

    recipe, chunk = model_of(words)
    lengths = [len(s) for s in sequences]
    packed = packed_of(recipe.model, lengths, torch.device("cpu"))
    with torch.no_grad():
        logits = chunk.eval()(torch.cat(list(sequences))[None], None, None, packed_seq_params=packed)
    return logits[0].split(lengths)
