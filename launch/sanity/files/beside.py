"""Checks of an export's files other than tensors: configuration, tokenizer, chat template, EOS ids and the manifest."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.checks import Check
from launch.sanity.tensors import looks
from launch.sanity.tensors.compare_worker import Seen
from launch.weights import hf_folder
from launch.weights.safetensors_folder import SafetensorsFolder
from launch.weights.shards import Shards
from recipes import json_file
from recipes.checkpoint.checkpoint_config import AGAIN, exported, read_config, rope_differences
from recipes.checkpoint.tensors import is_mtp
from recipes.config import Model, Mtp

_ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "max_position_embeddings")
_EOS, _MTP = "eos_token_id", "num_nextn_predict_layers"
_SPECIAL = ("tokenizer_config.json", "special_tokens_map.json")
_TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt")
Look = tuple[str, Sequence[str]]


def other_file_checks(export: Path, base: Path, m: Model) -> list[Check]:
    """Return the checks of these files against the base's files and the recipe's model."""
    return [
        looks.file_check("manifest", "files changed since they were written", "hashes as written", lambda: _manifest(export)),
        looks.file_check("config.json", "a server that builds another model", "the base's, with the recipe's changes",
                     lambda: _config(export, base, m)),
        looks.file_check("rope", "positions that the model was not trained with", "the recipe's", lambda: _rope(export, base, m)),
        looks.file_check("EOS ids", "answers that do not end", "the base's", lambda: _eos(export, base)),
        looks.file_check("tokenizer", "tokens that mean something else", "the base's, byte for byte",
                     lambda: _same_bytes(export, base, _TOKENIZER)),
        looks.file_check("special tokens", "markers read as text", "the base's", lambda: _special(export, base)),
        looks.file_check("chat template file", "prompts at inference that differ from the training text", "the base's",
                     lambda: _template(export, base)),
        looks.file_check("generation config", "sampling that the base was not tuned for", "the base's",
                     lambda: _generation(export, base)),
    ]  # fmt: skip


def mtp(seen: dict[str, Seen], shards: Shards, base: SafetensorsFolder, m: Model) -> Check:
    """Check multi-token-prediction layers: their number is that of `config.json`, and their bits are the base's."""

    def look() -> Look:
        there = {n for n in shards.files if is_mtp(n, m)}
        wanted = {n for n in base.entries if is_mtp(n, m)} if m.mtp is Mtp.copy else set()
        layers = len({n.split(".")[2] for n in there})
        said = _json(shards.folder / "config.json").get(_MTP) or 0
        lines = [f"config.json says {_MTP}={said}, but there are tensors of {layers}"] if said != layers else []
        lines += [f"{n} is missing" for n in sorted(wanted - there)]
        lines += [f"{n} is present, but the recipe says model.mtp={m.mtp.value}" for n in sorted(there - wanted)]
        lines += [f"{n} is not the base's" for n in sorted(wanted & seen.keys()) if not _equal(seen[n])]
        return f"{layers} layers, {len(there)} tensors", lines

    return looks.file_check(
        "MTP layers", "speculative decoding that fails or guesses at random", "as configured, the base's bits", look
    )


def _equal(seen: Seen) -> bool:
    return seen.base is not None and seen.base.equal


def _json(path: Path) -> dict[str, Any]:
    """Return a file's JSON object; an empty one if the file does not exist."""
    return json_file.read_json(path, AGAIN) if path.is_file() else {}


def _without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in names}


def _only(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k in names}


def _wanted(base: Path, m: Model) -> dict[str, Any]:
    return exported(m, read_config(base))


def _manifest(export: Path) -> Look:
    path = export / hf_folder.MANIFEST
    written = json_file.read_json(path, AGAIN)
    with json_file.shape(path, AGAIN):
        written = dict(written["files"])
    there = hf_folder.hashes(export)
    lines = [f"{n} is missing" for n in sorted(written.keys() - there.keys())]
    lines += [f"{n} was not written by the export" for n in sorted(there.keys() - written.keys())]
    lines += [f"{n} is not the file that was written" for n in sorted(written) if n in there and there[n] != written[n]]
    return f"{len(written)} files", lines


def _config(export: Path, base: Path, m: Model) -> Look:
    apart = (*_ROPE, _EOS, _MTP)  # these have checks of their own
    config, wanted = (_without(c, *apart) for c in (_json(export / "config.json"), _wanted(base, m)))
    return f"{len(wanted)} fields", looks.differing(config, wanted, "config.json")


def _rope(export: Path, base: Path, m: Model) -> Look:
    config = _json(export / "config.json")
    lines = looks.differing(_only(config, *_ROPE), _only(_wanted(base, m), *_ROPE), "config.json")
    return m.rope.value, lines or [fault.problem for fault in rope_differences(m, config)]


def _eos(export: Path, base: Path) -> Look:
    lines: list[str] = []
    for file in ("config.json", "generation_config.json"):
        lines += looks.differing(_only(_json(export / file), _EOS), _only(_json(base / file), _EOS), file)
    return str(_json(export / "config.json").get(_EOS)), lines


def _same_bytes(export: Path, base: Path, names: Sequence[str]) -> Look:
    there = [n for n in names if (base / n).is_file() or (export / n).is_file()]
    return ", ".join(there) or "none", [line for n in there for line in _unlike(export / n, base / n)]


def _unlike(one: Path, base: Path) -> list[str]:
    if not one.is_file():
        return [f"{one.name} is missing"]
    if not base.is_file():
        return [f"{one.name} is present, but the base has none"]
    return [] if one.read_bytes() == base.read_bytes() else [f"{one.name} is not the base's"]


def _special(export: Path, base: Path) -> Look:
    lines: list[str] = []
    for file in _SPECIAL:
        one, other = (_without(_json(folder / file), "chat_template") for folder in (export, base))
        lines += looks.differing(one, other, file)
    return ", ".join(n for n in _SPECIAL if (base / n).is_file()), lines


def _template(export: Path, base: Path) -> Look:
    found, lines = _same_bytes(export, base, ("chat_template.jinja",))
    one, other = (_json(folder / "tokenizer_config.json").get("chat_template") for folder in (export, base))
    if one != other:
        lines = [*lines, "the chat_template of tokenizer_config.json is not the base's"]
    return found if found != "none" or other is None else "tokenizer_config.json", lines


def _generation(export: Path, base: Path) -> Look:
    name = "generation_config.json"
    one, other = (_without(_json(folder / name), _EOS) for folder in (export, base))
    return f"{len(other)} fields", looks.differing(one, other, name)
