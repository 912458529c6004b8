"""Copies of a good export with one fault each: `broken.py EXPORT BASE OTHER_BASE OUT` writes every one that the model can have.

The manifest is written anew, as if the export itself had been at fault, unless the fault is one of copying.
"""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[3])]

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor  # noqa: E402

from launch.weights import hf_folder  # noqa: E402
from launch.weights.safetensors_folder import SafetensorsFolder  # noqa: E402

Tensors = dict[str, Tensor]
LAYER, HEAD = "model.layers.1.", 24  # of both tiny models, and the rows of a head


@dataclass(frozen=True)
class Folder:
    """The copy, what it was trained from, and a base of another model."""

    path: Path
    base: Path
    other: Path

    def tensors(self, change: Callable[[Tensors], Any]) -> None:
        """Changes, adds or removes tensors, and the index with them."""
        files = SafetensorsFolder(self.path).files
        held = {n: t for f in set(files.values()) for n, t in load_file(self.path / f).items()}
        change(held)
        for old in set(files.values()):
            (self.path / old).unlink()
        save_file({n: t.contiguous() for n, t in held.items()}, self.path / hf_folder.file_name(1, 1), {"format": "pt"})
        self.index(lambda index: index.update(dict.fromkeys(held, hf_folder.file_name(1, 1))), held)

    def index(self, change: Callable[[dict[str, str]], Any], held: Tensors | None = None) -> None:
        path = self.path / hf_folder.INDEX
        index = json.loads(path.read_text())
        if held is not None:
            index = {"metadata": {"total_size": sum(t.nbytes for t in held.values())}, "weight_map": {}}
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    def json(self, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
        config = json.loads((self.path / name).read_text())
        change(config)
        (self.path / name).write_text(json.dumps(config))

    def shard(self) -> Path:
        return max(self.path.glob("*.safetensors"), key=lambda p: p.stat().st_size)


@dataclass(frozen=True)
class Fault:
    """check: the one that must fail, and says: a pattern of its message. copied: the manifest is the good export's. by_base: a
    pattern of what `PLACES` says beside the base alone, where weights are in another's place."""

    check: str
    says: str
    make: Callable[[Folder], Any]
    copied: bool = False
    by_base: str | None = None


TRAINED, PLACES = "weights as trained", "weights in their places"


def misplaced(says: str, by_base: str, change: Callable[[Tensors], Any]) -> Fault:
    return Fault(TRAINED, says, lambda f: f.tensors(change), by_base=by_base)


def swap(one: str, other: str) -> Callable[[Tensors], None]:
    def change(held: Tensors) -> None:
        held[one], held[other] = held[other], held[one]

    return change


def _heads(name: str, axis: int) -> Callable[[Tensors], None]:
    """Every head in the place of the next."""
    return lambda held: held.update({name: held[name].roll(HEAD, axis)})


def _fused(held: Tensors) -> None:
    """For every head of keys its queries, its key and its value, taken for all queries, all keys, all values."""
    q, k, v = (held[f"{LAYER}self_attn.{c}_proj.weight"] for c in "qkv")
    groups = len(k) // HEAD
    whole = torch.cat([part.unflatten(0, (groups, -1)) for part in (q, k, v)], 1).flatten(0, 1)
    for c, part in zip("qkv", whole.split([len(q), len(k), len(v)]), strict=True):
        held[f"{LAYER}self_attn.{c}_proj.weight"] = part


def _interleaved(held: Tensors) -> None:
    """Of queries and keys the two rows of a rotated pair side by side."""
    turned = int(HEAD * (0.5 if "lm_head.weight" in held else 1))
    for c in "qk":
        name = f"{LAYER}self_attn.{c}_proj.weight"
        heads = held[name].unflatten(0, (-1, HEAD))
        pairs = heads[:, :turned].unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        held[name] = torch.cat([pairs, heads[:, turned:]], 1).flatten(0, 1)


def _gathered(held: Tensors) -> None:
    """Both halves of a rank, of two, taken for the whole gate and the whole up projection."""
    gate, up = held[GATE].chunk(2), held[UP].chunk(2)
    held[GATE], held[UP] = torch.cat([gate[0], up[0]]), torch.cat([gate[1], up[1]])


def _set(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[Folder], None]:
    return lambda f: f.tensors(lambda held: held.update({name: value(held[name])}))


def _base_layer(f: Folder) -> None:
    base = SafetensorsFolder(f.base)
    f.tensors(lambda held: held.update({n: base.read(n) for n in held if n.startswith(LAYER)}))


def _whole_base(f: Folder) -> None:
    base = SafetensorsFolder(f.base)
    f.tensors(lambda held: held.update({n: base.read(n) for n in held}))


def _shuffle(held: Tensors) -> None:
    names = [n for n in held if n.startswith(f"{LAYER}mlp.experts.")]
    taken = {n: held[n] for n in names}
    experts = 1 + max(int(n.split(".")[5]) for n in names)
    for n in names:
        words = n.split(".")
        words[5] = str((int(words[5]) + 1) % experts)
        held[n] = taken[".".join(words)]


def _drop(part: str) -> Callable[[Folder], None]:
    def change(held: Tensors) -> None:
        for name in [n for n in held if part in n]:
            del held[name]

    return lambda f: f.tensors(change)


def _truncate(f: Folder) -> None:
    with f.shard().open("r+b") as file:
        file.truncate(f.shard().stat().st_size - 1000)


def _flip(f: Folder) -> None:
    """A bit of the last element's least byte: no other check can see it."""
    with f.shard().open("r+b") as file:
        file.seek(-4, 2)
        byte = file.read(1)
        file.seek(-4, 2)
        file.write(bytes([byte[0] ^ 1]))


def _two_shards(f: Folder) -> None:
    name, tensor = next(iter(load_file(f.shard()).items()))
    save_file({name: tensor}, f.path / "model-00009-of-00009.safetensors", {"format": "pt"})


def _theta(config: dict[str, Any]) -> None:
    (config["rope_parameters"] if config.get("rope_parameters") else config)["rope_theta"] = 5e5


def _nan(tensor: Tensor) -> Tensor:
    tensor.view(-1)[7] = float("nan")
    return tensor


O_PROJ, K_PROJ, Q_PROJ = (f"{LAYER}self_attn.{n}_proj.weight" for n in "okq")
GATE, UP = (f"model.layers.0.mlp.{n}_proj.weight" for n in ("gate", "up"))
BIAS = f"{LAYER}mlp.gate.e_score_correction_bias"

FAULTS = {
    "a missing tensor": Fault("tensor names", r"model\.norm\.weight is missing", _drop("model.norm.weight")),
    "a tensor of no model": Fault(
        "tensor names", r"model\.extra is not in the base", lambda f: f.tensors(lambda h: h.update({"model.extra": torch.ones(2)}))
    ),
    "a transposed tensor": Fault("tensor shapes", r"k_proj\.weight is \[96, 48\]", _set(K_PROJ, lambda t: t.T)),
    "a square tensor transposed": misplaced(
        r"o_proj\.weight is the checkpoint's transposed", r"o_proj\.weight is its own transposed",
        lambda held: held.update({O_PROJ: held[O_PROJ].T}),
    ),
    "another dtype": Fault("tensor dtypes", r"o_proj\.weight is F16", _set(O_PROJ, Tensor.half)),
    "gate and up swapped": misplaced(
        r"up_proj\.weight \(gate and up swapped\)", r"up_proj\.weight \(gate and up swapped\)", swap(GATE, UP)),
    "keys and values swapped": misplaced(
        r"v_proj\.weight \(swapped\)", r"v_proj\.weight \(swapped\)", swap(K_PROJ, K_PROJ.replace("k_proj", "v_proj"))),
    "layers shuffled": misplaced(
        r"o_proj\.weight \(layers shuffled\)", r"o_proj\.weight \(layers shuffled\)",
        swap(O_PROJ, O_PROJ.replace("layers.1", "layers.0")),
    ),
    "rows of the fused QKV in another order": misplaced(
        r"k_proj\.weight has rows of its neighbours, in another order", r"[qkv]_proj\.weight has its rows in another order: head",
        _fused,
    ),
    "heads of the queries permuted": misplaced(
        r"q_proj\.weight has its rows in another order", r"q_proj\.weight has its rows in another order: head", _heads(Q_PROJ, 0)),
    "heads of the output permuted": misplaced(
        r"o_proj\.weight has its columns in another order", r"o_proj\.weight has its columns in another order: head",
        _heads(O_PROJ, 1),
    ),
    "rotated rows in another order": misplaced(
        r"q_proj\.weight has its rows in another order", r"q_proj\.weight is its own with the rows of a pair side by side",
        _interleaved,
    ),
    "parts of gate and up mixed": misplaced(
        r"up_proj\.weight has rows of its neighbours", r"(up|gate)_proj\.weight has its rows in another order: part", _gathered),
    "noise added to a tensor": Fault(
        TRAINED, r"o_proj\.weight is not the checkpoint's", _set(O_PROJ, lambda t: t + 0.03 * torch.randn(t.shape))
    ),
    "a layer not updated": Fault("every layer moved", "nothing moved in layer 1,", _base_layer),
    "the base instead of the export": Fault("every layer moved", "these are the base's weights", _whole_base),
    "NaN": Fault("finite numbers", r"o_proj\.weight has 1 of 9,216 elements NaN", _set(O_PROJ, _nan)),
    "infinity": Fault("finite numbers", r"o_proj\.weight has 9,216 of", _set(O_PROJ, lambda t: t / 0)),
    "a wrong chat template": Fault(
        "chat template file", "chat_template.jinja is not the base's",
        lambda f: shutil.copyfile(f.other / "chat_template.jinja", f.path / "chat_template.jinja"),
    ),
    "the tokenizer of another model": Fault(
        "tokenizer", "tokenizer.json is not the base's",
        lambda f: shutil.copyfile(f.other / "tokenizer.json", f.path / "tokenizer.json")
    ),
    "a special token": Fault(
        "special tokens", "eos_token is", lambda f: f.json("tokenizer_config.json", lambda c: c.update(eos_token="x"))
    ),
    "a wrong EOS": Fault(
        "EOS ids", r"config\.json: eos_token_id is 5", lambda f: f.json("config.json", lambda c: c.update(eos_token_id=5))
    ),
    "a wrong EOS of generation": Fault(
        "EOS ids", "generation_config.json: eos_token_id is missing",
        lambda f: f.json("generation_config.json", lambda c: c.pop("eos_token_id")),
    ),
    "a generation config": Fault(
        "generation config", "temperature is 0.1", lambda f: f.json("generation_config.json", lambda c: c.update(temperature=0.1))
    ),
    "a wrong rope base": Fault("rope", "rope_.* is .*500000", lambda f: f.json("config.json", _theta)),
    "a field of the config": Fault(
        "config.json", "num_key_value_heads is 4", lambda f: f.json("config.json", lambda c: c.update(num_key_value_heads=4))
    ),
    "a truncated shard": Fault("shards", "bytes, and .* ends at", _truncate, copied=True),
    "a lost shard": Fault("shards", "is missing", lambda f: f.shard().unlink(), copied=True),
    "an entry of the index lost": Fault(
        "shards", r"norm\.weight is in .* the index does not", lambda f: f.index(lambda i: i.pop("model.norm.weight")), copied=True
    ),
    "no index": Fault("shards", "index.json cannot be read", lambda f: (f.path / hf_folder.INDEX).unlink(), copied=True),
    "a tensor in two shards": Fault("shards", "is in two shards", _two_shards),
    "a bit of a copy": Fault("manifest", "is not the file that was written", _flip, copied=True),
}  # fmt: skip
TIED = {
    "the embedding twice": Fault(
        "tied output layer", "differs from model.embed_tokens.weight",
        lambda f: f.tensors(lambda h: h.update({"lm_head.weight": h["model.embed_tokens.weight"] * 1.01})),
    ),
}  # fmt: skip
EXPERTS = {
    "a router bias rounded to bf16": Fault("router bias", "the base's rounded to bf16", _set(BIAS, lambda t: t.bfloat16().float())),
    "a router bias that was trained": Fault("router bias", "differs from the base's by 1.0e-03", _set(BIAS, lambda t: t + 1e-3)),
    "experts shuffled": misplaced(r"\(experts shuffled\)", r"\(experts shuffled\)", _shuffle),
    "no MTP layer": Fault("MTP layers", "says num_nextn_predict_layers=1, but there are tensors of 0", _drop("model.layers.3.")),
    "an MTP layer not told": Fault(
        "MTP layers", "predict_layers=0, but there are tensors of 1",
        lambda f: f.json("config.json", lambda c: c.update(num_nextn_predict_layers=0)),
    ),
    "an MTP layer that moved": Fault(
        "MTP layers", r"eh_proj\.weight is not the base's", _set("model.layers.3.eh_proj.weight", lambda t: t * 1.001)
    ),
    "a zero tensor": Fault(
        "tensors not zero", r"q_proj\.bias is all zero", _set("model.layers.2.self_attn.q_proj.bias", torch.zeros_like)
    ),
}  # fmt: skip


def make(fault: Fault, export: Path, base: Path, other: Path, out: Path) -> Path:
    """The copy of `export` at `out` with this fault."""
    shutil.copytree(export, out)
    fault.make(Folder(out, base, other))
    if not fault.copied:
        (out / hf_folder.MANIFEST).write_text(json.dumps({"files": hf_folder.hashes(out)}))
    return out


def of(export: Path) -> dict[str, Fault]:
    """The faults that this model can have."""
    config = json.loads((export / "config.json").read_text())
    return (
        FAULTS | (TIED if config["tie_word_embeddings"] else {}) | (EXPERTS if config.get("n_routed_experts") else {})
    )


if __name__ == "__main__":
    good, trained_from, of_another, target = map(Path, sys.argv[1:])
    for name, fault in of(good).items():
        print(f"{make(fault, good, trained_from, of_another, target / name.replace(' ', '-'))}: {fault.check}")
