"""The driver's export, with one real rank behind it."""

import json
from types import SimpleNamespace

import pytest

from launch.megatron.engine import _export
from launch.model.safetensors_folder import SafetensorsFolder
from tests.launch.support import ranks_of


@pytest.mark.slow
def test_an_export_carries_the_yarn_it_was_trained_with(root, tmp_path):
    words = ["cluster.gpus_per_node=1", "model.native_context=512", "model.rope=yarn", "model.rope_factor=4"]
    with ranks_of(root, *words) as (plan, ranks):
        _export(plan.recipe, SimpleNamespace(hf=tmp_path / "hf"), ranks)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["rope_parameters"] == {
        "rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512,
    }  # fmt: skip
    assert config["max_position_embeddings"] == 2048
    assert SafetensorsFolder(tmp_path / "hf").files
