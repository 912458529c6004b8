"""Create the checkpoint of a tiny model.

It is an ordinary Hugging Face folder: seeded random weights, a byte-level BPE trained on the sample, and a chat template of
this project with the family's structure.
"""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.files import sha256, whole_folder
from data_prep.sources import read_trajectories
from launch.weights.hf_folder import INDEX
from recipes import json_file
from recipes.checkpoint import tensors
from recipes.config import Model, Recipe
from recipes.errors import ConfigError
from recipes.families import facts, template
from recipes.paths import REPO

SAMPLE = REPO / "data_prep" / "sample" / "train.jsonl"
RECORD = "limi.json"  # next to the checkpoint's files: its inputs
# Endings of tokens that Qwen3 and GLM-4.5 list as added but not as special. A decoder shows them.
SHOWN = ("think>", "tool_call>", "tool_response>", "arg_key>", "arg_value>")


def make(recipe: Recipe) -> bool:
    """Create the folder `model.checkpoint` if it is missing or was created here from other inputs. Return whether it was created.

    The same recipe and seed give the same bytes. A folder from elsewhere is not changed. No folder is created outside
    `models/` of `cluster.root`: a mistyped `model.checkpoint` must not become a random model.
    """
    folder = Path(recipe.model.checkpoint)
    if folder.parent != Path(recipe.cluster.root) / "models":
        return False
    inputs = _inputs(recipe)
    if folder.exists():
        record = json_file.read_json(folder / RECORD, "remove that file") if (folder / RECORD).is_file() else {}
        # A fetched model has a record with the same file name but other keys.
        if record.keys() != inputs.keys() or record == inputs:
            return False
        shutil.rmtree(folder)
    with whole_folder(folder) as scratch:
        _write_tokenizer(scratch, recipe.model)
        _write_weights(scratch, recipe.model, recipe.seed)
        (scratch / RECORD).write_text(json.dumps(inputs, indent=2) + "\n", encoding="utf-8")
    return True


def _inputs(recipe: Recipe) -> dict[str, Any]:
    """Return all inputs of the checkpoint as plain values."""
    # The base has unscaled positions for every recipe.
    excluded = ("checkpoint", "mtp", "native_context", "rope", "rope_factor", "template_options")
    dimensions = {k: getattr(v, "value", v) for k, v in vars(recipe.model).items() if k not in excluded}
    jinja = template(recipe.model.family)
    sources = [SAMPLE, jinja, jinja.with_suffix(".py"), Path(__file__)]  # the family's file has its special tokens
    return {"seed": recipe.seed, "model": dimensions, "sources": {p.name: sha256(p) for p in sources}}


def _write_tokenizer(folder: Path, m: Model) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    family = facts(m.family).tiny
    tokenizer = Tokenizer(models.BPE())
    # Split digits, and attach the leading space to a word, as both families' own pre-tokenizers do.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = [AddedToken(t, special=not t.endswith(SHOWN), normalized=False) for t in family.special]
    trainer = trainers.BpeTrainer(
        vocab_size=m.vocab - len(added),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = template(m.family).read_text(encoding="utf-8")
    tokenizer.train_from_iterator(_sample_texts(text, family.special), trainer)
    tokenizer.add_tokens(added)
    if tokenizer.get_vocab_size() > m.vocab:
        raise ConfigError(f"model.vocab={m.vocab} is below the tokenizer's {tokenizer.get_vocab_size()} tokens")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": family.eos[0],
        "pad_token": "<|endoftext|>",
        "model_max_length": m.max_position,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")


def _sample_texts(template: str, special: Sequence[str]) -> list[str]:
    """Return the rendered sample, split at the special tokens: the BPE must not learn from them."""
    from transformers.utils.chat_template_utils import render_jinja_template

    cut = re.compile("|".join(map(re.escape, special)))
    texts: list[str] = []
    for trajectory in read_trajectories(SAMPLE, "limi"):
        rendered: Any = render_jinja_template([trajectory.chat()], [*trajectory.tools], chat_template=template)
        texts += cut.split(rendered[0][0])
    return texts


def _write_weights(folder: Path, m: Model, seed: int) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = hf_config(m, json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"])
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            if "norm" in name:
                tensor.fill_(1.0)
            elif tensor.dim() > 1:
                tensor.normal_(0.0, 0.02, generator=generator)
            else:  # biases, including the router's expert bias
                tensor.uniform_(-0.01, 0.01, generator=generator)
    model.save_pretrained(folder)
    for layer in range(m.layers, m.layers + m.mtp_layers):
        # transformers has no MTP layer. Its tensors have the names of the released checkpoint and are never trained.
        shapes = {n: s for n, s in tensors.mtp(m).items() if n.startswith(f"model.layers.{layer}.")}
        drawn = {n: torch.empty(*s).normal_(0.0, 0.02, generator=generator) for n, s in shapes.items()}
        save_file(drawn, folder / f"mtp-{layer}.safetensors")
    _write_index(folder)


def _write_index(folder: Path) -> None:
    from safetensors import safe_open

    weight_map: dict[str, str] = {}
    size = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            weight_map |= dict.fromkeys(file.keys(), path.name)
            size += sum(file.get_tensor(name).nbytes for name in weight_map if weight_map[name] == path.name)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def hf_config(m: Model, added_tokens: list[dict[str, Any]]) -> Any:
    """Return the transformers configuration of a recipe's model."""
    import transformers

    ids = {t["content"]: t["id"] for t in added_tokens}
    common = dict(
        vocab_size=m.vocab, hidden_size=m.hidden, intermediate_size=m.ffn, num_hidden_layers=m.layers,
        num_attention_heads=m.heads, num_key_value_heads=m.kv_heads, head_dim=m.head_dim, hidden_act="silu",
        max_position_embeddings=m.max_position, rms_norm_eps=m.norm_eps, rope_theta=m.rope_base,
        attention_bias=m.qkv_bias, tie_word_embeddings=m.tied, bos_token_id=None, pad_token_id=ids["<|endoftext|>"],
        eos_token_id=[ids[t] for t in facts(m.family).tiny.eos],
    )  # fmt: skip
    family = facts(m.family).config
    own = {hf_name: getattr(m, field) for hf_name, field in family.names.items()} | family.constants
    if m.rope_fraction != 1:
        own["partial_rotary_factor"] = m.rope_fraction
    return getattr(transformers, family.architecture)(**common, **own)
