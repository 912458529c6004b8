"""`make export` of what the real slime saved, beside the Hugging Face folder that slime itself wrote of the same weights."""

import pytest
import torch

from launch.weights.safetensors_folder import SafetensorsFolder
from recipes.checkpoint.tensors import is_mtp
from recipes.compose.recipe import from_yaml
from tests.launch.slime.test_on_cpu import GLM, QWEN, trained
from tests.launch.support import limi

pytestmark = pytest.mark.contract

# A vocabulary of 760 rows is padded to 768.
LAYOUTS = {
    "Qwen3 TP2": (QWEN, "layout.tp=2 model.vocab=760"),
    "Qwen3 PP2": (QWEN, "layout.pp=2 model.layers=4"),
    "Qwen3 untied PP2": (QWEN, "layout.pp=2 model.layers=4 model.tied=false model.vocab=760"),
    "GLM EP2": (GLM, "layout.ep=2"),
    "GLM PP2 of 1 and 2 layers": (GLM, "layout.pp=2 layout.first_stage_layers=1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_export_of_slime_s_checkpoint_is_slime_s_own_bit_for_bit(root, tmp_path, name):
    from transformers import AutoModelForCausalLM

    model, layout = LAYOUTS[name]
    run = f"slime-export-{name.lower().replace(' ', '-')}"
    words = [
        *model, "optim.epochs=1", *layout.split(), f"model.checkpoint={root}/models/{run}",
        f"engine.args.save_hf={tmp_path}/theirs",
    ]  # fmt: skip
    trained(root, f"export {name}", *words)
    done = limi("export", f"run={run}", f"cluster.root={root}")
    assert done.returncode == 0, done.stderr
    assert "GB/s" in done.stdout

    folder = root / "runs" / run / "hf"
    m = from_yaml(root / "runs" / run / "config.yaml").model
    ours, theirs, base = (SafetensorsFolder(f) for f in (folder, tmp_path / "theirs", root / "models" / run))
    assert {n: (e.dtype, e.shape) for n, e in ours.entries.items()} == {
        n: (e.dtype, e.shape) for n, e in base.entries.items()
    }
    own = {n for n in ours.files if not is_mtp(n, m)}
    # Of a pipeline slime also writes the last stage's copy of a tied embedding.
    assert own == {n for n in theirs.files if not is_mtp(n, m)} - ({"lm_head.weight"} if m.tied else set())
    for tensor in ours.files:
        if "e_score_correction_bias" in tensor or is_mtp(tensor, m):
            assert torch.equal(ours.read(tensor), base.read(tensor)), tensor
        else:
            assert torch.equal(ours.read(tensor), theirs.read(tensor).to(ours.read(tensor).dtype)), tensor
    assert not torch.equal(ours.read("model.embed_tokens.weight"), base.read("model.embed_tokens.weight")), "trained"
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert all(is_mtp(n, m) for n in info["unexpected_keys"])
