"""YaRN in slime's model: Megatron-LM's own rotary code turns by transformers' angles and scales by its factor."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from data_prep.files import write_text
from recipes.compose.recipe import compose_recipe, to_yaml
from recipes.paths import REPO
from tests.launch.slime.support import on_cpu


@pytest.mark.contract
@pytest.mark.parametrize("words", [["model=qwen3-32b"], ["model=qwen3-tiny", "model.rope=yarn", "model.native_context=512",
                         "model.rope_factor=4"]], ids=["qwen3-32b", "qwen3-tiny"])  # fmt: skip
def test_cosines_sines_and_the_attention_factor_are_transformers(tmp_path, words):
    on_cpu()
    write_text(tmp_path / "config.yaml", to_yaml(compose_recipe(words)))
    done = subprocess.run(
        [os.environ["SLIME_PYTHON"], str(Path(__file__).parent / "yarn_tables.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": f"{REPO}:{os.environ['MEGATRON_ROOT']}:{os.environ['SLIME_ROOT']}",
            "TORCHDYNAMO_DISABLE": "1",
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert max(found["cos"], found["sin"], found["scale"]) < 1e-6
    assert found["length"] in (155_648, 2048)
