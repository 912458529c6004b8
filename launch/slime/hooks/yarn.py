"""slime's model with YaRN's positions, used through `--custom-model-provider-path`: the pinned Megatron-LM has no flag for YaRN."""

import copy
import os
from pathlib import Path
from typing import Any

from launch.model.rotary import yarn_frequencies
from launch.slime.job import RUN
from recipes.compose.recipe import from_yaml


def provider(pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None) -> Any:
    """Build the model that slime would build, and set its rotary embedding and attention to the recipe's YaRN."""
    from megatron.training.global_vars import get_args
    from slime.backends.megatron_utils.model_provider import _get_model_provider_func

    plain = copy.copy(get_args())
    plain.custom_model_provider_path = None
    chunk = _get_model_provider_func(plain)(pre_process, post_process, vp_stage)
    scale(chunk, Path(os.environ[RUN]))
    return chunk


def scale(chunk: Any, run: Path) -> None:
    """Switch a model chunk to YaRN: replace its frequencies with those of `launch.model.rotary.yarn_frequencies`, and set the
    configuration field by which Megatron's attention multiplies cosine and sine by 0.1 ln(factor) + 1."""
    m = from_yaml(run / "config.yaml").model
    chunk.config.yarn_rotary_scaling_factor = m.rope_factor
    chunk.rotary_pos_emb.inv_freq = yarn_frequencies(m)
