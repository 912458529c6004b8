"""Run as `seam_faults.py ROOT`, in a process of its own: the seam with one fault after another put back into it. Prints, as JSON, by
fault what it raised, or by how much the loss is off the embedded engine's where it raised nothing."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from launch.megatron import cpu

cpu.install()

import torch  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.transformer import attention as of_megatron  # noqa: E402

from launch.megatron import batch, rank  # noqa: E402
from launch.megatron.cpu import CPU  # noqa: E402
from launch.model import attention, gpt  # noqa: E402
from launch.model.layers import block_spec  # noqa: E402
from launch.slime.hooks import cpu as of_slime  # noqa: E402
from launch.weights import hf_names  # noqa: E402
from launch.weights.safetensors_folder import SafetensorsFolder  # noqa: E402
from tests.launch.one_rank import one_rank  # noqa: E402
from tests.launch.slime import seam  # noqa: E402
from tests.launch.support import recipe_of  # noqa: E402


def missing_argument() -> Any:
    """The spec function hands on by position what `block_spec` takes by name."""
    by_position: Any = block_spec
    return mock.patch.object(of_slime, "layers", lambda args, config, vp_stage=None: by_position(config, vp_stage))


def missing_field() -> Any:
    """Attention asks every batch for the lengths that only the embedded engine's carries."""
    return mock.patch.object(attention, "lengths_of", lambda packed: packed.lengths)


def rotated_twice() -> Any:
    """The batch brings angles, and Megatron rotates as well."""
    return mock.patch.object(seam, "pack", batch.pack)


def rotated_by_nobody() -> Any:
    """Neither the batch nor the model has positions."""
    original = GPTModel.__init__
    return mock.patch.object(
        GPTModel,
        "__init__",
        lambda self, *given, **named: original(self, *given, **{**named, "position_embedding_type": "none"}),
    )


@contextlib.contextmanager
def unrotated_keys() -> Iterator[None]:
    """Megatron rotates queries alone, without an error: only numbers show it."""
    original, calls = of_megatron.apply_rotary_pos_emb, iter(range(10**9))

    def every_other(t: Any, *given: Any, **named: Any) -> Any:
        return original(t, *given, **named) if next(calls) % 2 == 0 else t

    with mock.patch.object(of_megatron, "apply_rotary_pos_emb", every_other):
        yield


FAULTS = {
    "none": contextlib.nullcontext,
    "missing argument": missing_argument,
    "missing field": missing_field,
    "rotated twice": rotated_twice,
    "rotated by nobody": rotated_by_nobody,
    "unrotated keys": unrotated_keys,
}


def main(root: Path) -> None:
    recipe, data, _ = recipe_of(root, "model=qwen3-tiny", "cluster.gpus_per_node=1")
    config, read = gpt.transformer_config(recipe), SafetensorsFolder(Path(recipe.model.checkpoint)).read

    def loss(of: Any, call: Any, make: Any) -> float:
        """Of the first two sequences, a supervised token."""
        chunks = of(recipe, config)
        hf_names.load(chunks, recipe.model, read)
        with torch.no_grad():
            output, by = call(iter([make(data, (0, 1), recipe, 0, CPU)]), chunks[0])
            total, count, _ = by(output)
        return float(total / count)

    own = loss(gpt.build_chunks, rank._forward_step, batch.pack)
    found: dict[str, str | float] = {}
    for name, fault in FAULTS.items():
        with fault():
            try:
                found[name] = abs(loss(seam.build_chunks, seam.forward_step, seam.pack) - own)
            except (TypeError, AttributeError, ValueError) as error:
                found[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(found))


if __name__ == "__main__":
    with one_rank():
        main(Path(sys.argv[1]))
