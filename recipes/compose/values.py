"""The check of single values of a recipe. `layout.py` checks how the values of a layout fit together."""

import math
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from recipes.compose.kinds import advice, shown
from recipes.config import EngineName, Recipe, Rope
from recipes.errors import ConfigError

SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)$", re.I)


def check_values(r: Recipe) -> None:
    """Raise `ConfigError` for the first value that no run can have, with the value, the limit and the override."""
    if not re.fullmatch(r"[\w.-]{1,100}", r.run) or r.run.startswith("."):
        raise ConfigError(
            f"run='{shown(r.run)}': a run's name is 1 to 100 letters, digits, '.', '_' and '-'", "write run=my-run"
        )
    if not os.path.isabs(r.cluster.root):
        raise ConfigError(
            f"cluster.root='{shown(r.cluster.root)}' is not absolute",
            advice(f"cluster.root={Path(r.cluster.root).absolute()}"),
        )
    if r.cluster.address is not None and not re.fullmatch(r"https?://[^/\s]+/?", r.cluster.address):
        raise ConfigError(
            f"cluster.address='{shown(r.cluster.address)}' is not that of a Ray dashboard",
            "write cluster.address=http://HEAD:8265",
        )
    if r.sanity.url is not None and not _is_server(r.sanity.url):
        raise ConfigError(
            f"sanity.url='{shown(r.sanity.url)}' is not that of a server", "write sanity.url=http://HOST:30000"
        )
    least: dict[str, float] = {
        "optim.epochs": 1, "optim.batch_size": 1, "optim.copies": 1, "optim.warmup_steps": 0, "optim.eval_steps": 1,
        "model.native_context": 1, "layout.loss_chunk": 1,
        "layout.first_stage_layers": 1, "layout.last_stage_layers": 1,
        "engine.save_steps": 1, "engine.keep_last": 1, "engine.timeout": 1, "engine.node_timeout": 1, "engine.max_retries": 0,
        "sanity.timeout": 1, "sanity.tp": 1, "sanity.max_moved": 1, "sanity.max_above_base": 0, "sanity.prompts": 1,
        "sanity.min_tool_calls": 0, "sanity.min_finished": 0, "sanity.min_well_formed": 0,
        "data.max_tokens": 2, "data.max_rejected": 0, "data.workers": 1,
        "cluster.nodes": 1, "cluster.cpus_per_node": 1, "cluster.gpus_per_node": 1,
        "layout.tp": 1, "layout.pp": 1, "layout.vpp": 1, "layout.cp": 1, "layout.ep": 1, "layout.etp": 1,
    }  # fmt: skip
    sizes = ("layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab", "max_position")
    least |= {f"model.{size}": 1 for size in sizes}
    for name, limit in least.items():
        group, key = name.split(".")
        if (value := getattr(getattr(r, group), key)) is not None and value < limit:
            raise ConfigError(f"{name}={value} is below {limit}", f"write {name}={limit} or more")
    if not r.layout.search and r.layout.max_tokens_per_gpu < 1:
        raise ConfigError(
            f"layout.max_tokens_per_gpu={r.layout.max_tokens_per_gpu} is below 1",
            "write layout.max_tokens_per_gpu=1 or more",
        )
    if not 0 <= r.optim.min_lr_ratio <= 1:
        raise ConfigError(f"optim.min_lr_ratio={r.optim.min_lr_ratio} is not a share", "write optim.min_lr_ratio=0.1")
    if not 0 < r.optim.lr < float("inf"):
        raise ConfigError(f"optim.lr={r.optim.lr} is not a positive number", "write for example optim.lr=1e-5")
    if r.engine.spike is not None and not r.engine.spike > 1:
        raise ConfigError(
            f"engine.spike={r.engine.spike:g} would stop training even when the loss does not rise; it must be above 1",
            "write engine.spike=5, or engine.spike=null",
        )
    if r.step is not None and r.step < 1:
        raise ConfigError(f"step={r.step}: the first step is 1", "write step=1 or more")
    fraction = r.optim.warmup_fraction
    if fraction is not None and not 0 <= fraction < 1:
        raise ConfigError(
            f"optim.warmup_fraction={fraction} leaves no step after it", "write optim.warmup_fraction=0.1"
        )
    _check_rope(r)
    _check_machines(r)
    _check_read(r)
    if secret := next((name for name in r.cluster.env if SECRET.search(name)), None):
        raise ConfigError(
            f"cluster.env.{secret} would be written to config.yaml, job.json and Ray's dashboard",
            f"leave it out, and set {secret} in the environment in which `ray start` runs on the nodes",
        )


def _check_read(r: Recipe) -> None:
    """Raise `ConfigError` if an option is set that this engine or machine does not read."""
    slime = r.engine.name is EngineName.slime
    for name in ("wandb", "slime_root", "megatron_root", "node_timeout"):
        if not slime and (value := getattr(r.engine, name)) is not None:
            figures = "; the same figures are in the run's tensorboard/ and metrics.jsonl" if name == "wandb" else ""
            raise ConfigError(
                f"engine.{name}={value} is slime's, and the embedded engine does not read it{figures}",
                f"write engine.{name}=null, or engine=slime",
            )
    on_cpu = r.gpu.memory_mib is None
    if not slime and on_cpu and r.engine.python is not None:
        raise ConfigError(
            f"engine.python={r.engine.python} is slime's, or SGLang's on GPUs, and nothing here would run by it",
            "write engine.python=null",
        )
    if on_cpu and r.sanity.tp not in (None, 1):
        raise ConfigError(f"sanity.tp={r.sanity.tp} needs GPUs, but gpu={r.gpu.name}", "write sanity.tp=null")
    if r.sanity.url is not None and r.sanity.port is not None:
        raise ConfigError(
            f"sanity.port={r.sanity.port} is of a server that is started here, and sanity.url={r.sanity.url} is up already",
            "write sanity.port=null",
        )
    if slime and r.model.rope_base != int(r.model.rope_base):
        raise ConfigError(
            f"model.rope_base={r.model.rope_base} is no whole number, and slime reads one",
            f"write model.rope_base={round(r.model.rope_base)}, or engine=megatron",
        )


def _is_server(url: str) -> bool:
    """Return whether the address is http(s)://HOST:PORT and nothing more."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    bare = parts.path in ("", "/") and not (parts.query or parts.fragment or parts.username) and port != 0
    return bool(parts.scheme in ("http", "https") and parts.hostname and bare) and not re.search(r"\s", url)


def _check_rope(r: Recipe) -> None:
    """Raise `ConfigError` if `model.rope_factor` does not fit `model.rope`."""
    m = r.model
    if m.rope is not Rope.yarn:
        if m.rope_factor != 1:
            raise ConfigError(
                f"model.rope_factor={m.rope_factor:g} is of YaRN alone, and model.rope={m.rope.value}",
                "write model.rope_factor=1, or model.rope=yarn",
            )
    elif not 1 < m.rope_factor < float("inf"):
        needed = math.ceil(100 * r.data.max_tokens / m.native_context) / 100
        reaching = f"model.rope_factor={needed} for data.max_tokens={r.data.max_tokens}, or " if needed > 1 else ""
        raise ConfigError(
            f"model.rope=yarn scales by more than 1, and model.rope_factor={m.rope_factor:g}",
            f"write {reaching}model.rope=native model.rope_factor=1",
        )


def _check_machines(r: Recipe) -> None:
    """Raise `ConfigError` if a figure of a GPU or cluster is out of range."""
    figures = {f"gpu.{k}": v for k, v in vars(r.gpu).items() if k not in ("name", "dtype", "attention", "hour_price")}
    figures |= {f"cluster.{k}": getattr(r.cluster, k) for k in ("host_memory_gb", "network_gb_s", "disk_gb_s")}
    for name, value in figures.items():
        most = 1.0 if name.endswith("efficiency") else math.inf
        if value is not None and not (0 < value <= most and value < math.inf):
            limit = "above 0" if most == math.inf else "above 0 and at most 1"
            raise ConfigError(f"{name}={value} is no figure of a machine", f"leave {name} out, or write one {limit}")
    if (price := r.gpu.hour_price) is not None and not 0 <= price < math.inf:
        raise ConfigError(f"gpu.hour_price={price} is no price", "write for example gpu.hour_price=2.5")
