"""From `name=value` words to a checked `Recipe`."""

import difflib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, cast, get_args

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from recipes.config import Recipe, Rope
from recipes.errors import ConfigError
from recipes.layout import check_layout

REPO = Path(__file__).resolve().parents[1]
CONF = REPO / "hydra_conf"
GROUPS = sorted(p.name for p in CONF.iterdir() if p.is_dir())


def in_ray_job() -> bool:
    """Whether this process is the entry point of a Ray job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def local_root() -> str:
    """Default of `cluster.root` on one machine: the checkout, or `~/limi` in a Ray job, whose checkout is a copy
    that Ray removes."""
    return str(Path.home() / "limi") if in_ray_job() else str(REPO)


OmegaConf.register_new_resolver("repo", lambda: str(REPO), replace=True)
OmegaConf.register_new_resolver("local_root", local_root, replace=True)
ConfigStore.instance().store(name="schema", node=Recipe)


def leaves(node: Any = Recipe, prefix: str = "") -> dict[str, Any]:
    """Every name that can be overridden, with its type: `{"optim.lr": float, ...}`."""
    found: dict[str, Any] = {}
    for f in fields(node):
        if is_dataclass(f.type):
            found |= leaves(f.type, f"{prefix}{f.name}.")
        else:
            found[prefix + f.name] = f.type
    return found


def _is_text(kind: Any) -> bool:
    members = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return str in members and set(members) <= {str, NoneType}


def _checked(word: str, names: dict[str, Any]) -> str:
    """One command-line word in Hydra's grammar: known names only, and text that needs quotes quoted."""
    name, equals, value = word.partition("=")
    if not equals:
        raise ConfigError(f"'{word}' is not name=value; write for example optim.lr=2e-5, or see `make help`")
    plain = name.lstrip("+~")
    inside_dict = any(plain.startswith(f"{n}.") for n, kind in names.items() if getattr(kind, "__origin__", 0) is dict)
    if name != plain or not (plain in names or plain in GROUPS or inside_dict):
        near = difflib.get_close_matches(plain, [*names, *GROUPS], n=1, cutoff=0.0)
        raise ConfigError(f"unknown option '{name}'; the nearest is '{near[0]}': write {near[0]}={value}")
    if plain in GROUPS:
        _check_choice(plain, value)
    if inside_dict:
        return f"++{plain}={_quoted(value)}"
    return f"{plain}={_quoted(value)}" if _is_text(names.get(plain)) else f"{plain}={value}"


def _quoted(value: str) -> str:
    """Text as Hydra's grammar wants it, where , ( { [ ' = # and 1e3 mean something; quoted, null and ${...} stay."""
    if re.fullmatch(r"""'.*'|".*"|null|.*\$\{.*""", value, re.S):
        return value
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", value) + "'"


def _check_choice(group: str, value: str) -> None:
    choices = sorted(p.stem for p in (CONF / group).glob("*.yaml"))
    if value not in choices:
        near = difflib.get_close_matches(value, choices, n=1, cutoff=0.0)
        nearest = f"; the nearest is {group}={near[0]}" if near else ""
        raise ConfigError(f"unknown {group} '{value}'{nearest} (known: {', '.join(choices) or 'none'})")


def compose_recipe(words: Sequence[str]) -> Recipe:
    """The recipe of `hydra_conf/limi.yaml` with these overrides, every name, type and layout rule checked.

    Raises `ConfigError` with the nearest right name for a wrong one.
    """
    names = leaves()
    overrides = [_checked(word, names) for word in words]
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            raw = compose("limi", overrides)
        recipe = cast(Recipe, OmegaConf.to_object(raw))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explained(error)) from error
    _check_values(recipe)
    if recipe.layout.search:
        recipe.layout.fixed = [w.partition("=")[0].removeprefix("layout.") for w in words if w.startswith("layout.")]
    else:
        check_layout(recipe)
    return recipe


def _explained(error: BaseException) -> str:
    """The innermost cause, on one line, without Hydra's advice to force a name in with '+'."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error)
    key = re.search(r"full_key: (\S+)", text)
    if isinstance(error, MissingMandatoryValue) and key:
        return f"{key[1]} is not set; write {key[1]}=VALUE"
    if missing := re.search(r"Could not find 'layout/released-(.*)'", text):
        raise ConfigError(f"experiment=released is of LIMI's own models, and not of {missing[1]}; write model=qwen3-4b")
    first = text.splitlines()[0].split(". To append")[0]
    return f"{key[1]}: {first}" if key else " ".join(text.split())


def _check_values(r: Recipe) -> None:
    if not re.fullmatch(r"[\w.-]{1,100}", r.run) or r.run.startswith("."):
        raise ConfigError(
            f"run='{r.run}': a run's name is 1 to 100 letters, digits, '.', '_' and '-'; write run=my-run"
        )
    if not os.path.isabs(r.cluster.root):
        raise ConfigError(
            f"cluster.root='{r.cluster.root}' is not absolute; write cluster.root={Path(r.cluster.root).absolute()}"
        )
    least: dict[str, float] = {
        "optim.epochs": 1, "optim.batch_size": 1, "optim.copies": 1, "optim.warmup_steps": 0, "optim.eval_steps": 1,
        "optim.warmup_fraction": 0, "model.native_context": 1, "gpu.hour_price": 0, "layout.loss_chunk": 1,
        "layout.first_stage_layers": 1, "layout.last_stage_layers": 1,
        "engine.save_steps": 1, "engine.keep_last": 1, "engine.timeout": 1, "sanity.timeout": 1,
        "data.max_tokens": 2, "data.max_rejected": 0, "data.workers": 1,
        "cluster.nodes": 1, "cluster.gpus_per_node": 1,
        "layout.tp": 1, "layout.pp": 1, "layout.vpp": 1, "layout.cp": 1, "layout.ep": 1, "layout.etp": 1,
    }  # fmt: skip
    for name, limit in least.items():
        group, key = name.split(".")
        if (value := getattr(getattr(r, group), key)) is not None and value < limit:
            raise ConfigError(f"{name}={value} is below {limit}; write {name}={limit} or more")
    if not r.layout.search and r.layout.max_tokens_per_gpu < 1:
        raise ConfigError(
            f"layout.max_tokens_per_gpu={r.layout.max_tokens_per_gpu} is below 1; write layout.max_tokens_per_gpu=1 or more"
        )
    if not 0 <= r.optim.min_lr_ratio <= 1:
        raise ConfigError(f"optim.min_lr_ratio={r.optim.min_lr_ratio} is not a share; write optim.min_lr_ratio=0.1")
    if not 0 < r.optim.lr < float("inf"):
        raise ConfigError(f"optim.lr={r.optim.lr} is not a positive number; write for example optim.lr=1e-5")
    _check_rope(r)


def _check_rope(r: Recipe) -> None:
    m = r.model
    if m.rope is not Rope.yarn:
        if m.rope_factor != 1:
            raise ConfigError(
                f"model.rope_factor={m.rope_factor:g} is of YaRN alone, and model.rope={m.rope.value}; write "
                "model.rope_factor=1, or model.rope=yarn"
            )
    elif not 1 < m.rope_factor < float("inf"):
        needed = math.ceil(100 * r.data.max_tokens / m.native_context) / 100
        reaching = f"model.rope_factor={needed} for data.max_tokens={r.data.max_tokens}, or " if needed > 1 else ""
        raise ConfigError(
            f"model.rope=yarn scales by more than 1, and model.rope_factor={m.rope_factor:g}; write {reaching}"
            "model.rope=native model.rope_factor=1"
        )


def run_folder(r: Recipe) -> Path:
    """`runs/NAME/` under `cluster.root`: everything one run leaves behind."""
    return Path(r.cluster.root) / "runs" / r.run


def to_yaml(r: Recipe) -> str:
    """The resolved recipe as YAML, for `config.yaml`, `dry_run=true` and the report."""
    return OmegaConf.to_yaml(OmegaConf.structured(r))
