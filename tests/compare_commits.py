"""Compares what two commits pack, plan and train: `python -m tests.compare_commits OLD NEW`, two checkouts with their environments.

Each checkout first records what it does, by its own command line, in `record/`: the packed sequences of every golden case; `plan.json`
and the `argv` of `job.json` of every model, cluster and experiment; metrics and weights of the two default runs and of five layouts.
Then both records are compared. Not compared are times, paths, keys and hashes of code, and the words of errors and warnings; `RENAMED`
maps the names of modules in the old `argv`.
"""

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODELS = ("qwen3-4b", "qwen3-8b", "qwen3-14b", "qwen3-32b", "glm4.5-air", "glm4.5")
CLUSTERS = ("h100x8", "h100x64", "h200x8", "h200x32", "a100x64")
TINY = ("qwen3-tiny", "glm4.5-tiny")
# Of `make parity`, five steps each.
LAYOUTS = {
    "cp2": "model=qwen3-tiny layout.cp=2",
    "tp2-sp": "model=qwen3-tiny layout.tp=2 layout.sp=true",
    "pp2-vpp2": "model=qwen3-tiny layout.pp=2 layout.vpp=2",
    "glm-tp2-sp-ep2": "model=glm4.5-tiny layout.tp=2 layout.sp=true layout.ep=2",
    "linear-offloaded": "model=qwen3-tiny layout.recompute=linear layout.offload=true",
}
RENAMED = {f"launch.slime.{name}": f"launch.slime.hooks.{name}" for name in ("rollout", "steps", "yarn")}
# Keys of plan.json.
_APART = (
    "warnings",
    "time",
    "seconds",
    "folder",
    "path",
    "key",
    "code",
    "root",
    "search_s",
    "checkpoint",
)


def record(folder: Path, trains: bool) -> None:
    """Run the checkout that this process works in, and write what came of it."""
    sys.path.insert(0, str(Path.cwd()))
    from launch import limi  # of that checkout

    root = folder / "root"

    def run(*words: str) -> str:
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = limi.main([*words, f"cluster.root={root}"])
        err.flush()
        return f"{status}\n{err.buffer.getvalue().decode()}" if status else ""

    said: dict[str, str] = {}
    golden = Path("tests/data_prep/golden")
    for case, model in itertools.product(sorted(golden.glob("*.json")), TINY):
        one = folder / "golden" / f"{case.stem}.jsonl"
        one.parent.mkdir(parents=True, exist_ok=True)
        held = json.loads(case.read_text(encoding="utf-8"))
        one.write_text(json.dumps(held["record"]) + "\n", encoding="utf-8")
        name = f"golden {case.stem} {model}"
        out = folder / "packed" / name.replace(" ", "-")
        said[name] = run(
            "data",
            f"model={model}",
            f"data.source={held['source']}",
            f"data.path={one}",
            f"data.out={out}",
            "data.max_rejected=1",
        )
    for model, cluster, experiment in itertools.product(MODELS, CLUSTERS, ("", "experiment=released")):
        words = [f"model={model}", f"cluster={cluster}", *filter(None, [experiment])]
        name = f"{model} {cluster} {experiment}".strip()
        slug = re.sub(r"[^\w.]+", "-", name)
        said[f"plan {name}"] = run("plan", *words, f"run={slug}")
        said[f"job {name}"] = run("train", *words, f"run={slug}", "dry_run=true")
    if trains:
        quick = ["sanity.url=http://127.0.0.1:9", "optim.epochs=1", "optim.eval_steps=5", "optim.warmup_steps=0"]
        for model in TINY:
            said[f"train {model}"] = run("train", f"model={model}", f"run={model}", "sanity.url=http://127.0.0.1:9")
        for name, layout in LAYOUTS.items():
            said[f"train {name}"] = run("train", *layout.split(), f"run={name}", "model.layers=4", *quick)
    (folder / "said.json").write_text(json.dumps(said, indent=1), encoding="utf-8")


def differences(old: Path, new: Path) -> Iterator[str]:
    """What the records do not have alike."""
    said = [json.loads((folder / "said.json").read_text(encoding="utf-8")) for folder in (old, new)]
    for name in said[0].keys() | said[1].keys():
        texts = [_plain(one.get(name, "not run"), folder) for one, folder in zip(said, (old, new), strict=True)]
        if _kind(texts[0]) != _kind(texts[1]):
            yield f"{name}: {texts[0][:300]!r} became {texts[1][:300]!r}"
    for name, read in {"packed": _packed, "root/plans": _plans, "root/runs": _runs}.items():
        before, after = read(old / name, old), read(new / name, new)
        for key in sorted(before.keys() | after.keys()):
            for place, (was, now) in _unlike(before.get(key), after.get(key)):
                yield f"{name} {key}{place}: {str(was)[:200]} became {str(now)[:200]}"


def _unlike(was: Any, now: Any, place: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Where two values differ, as deep as they are alike around it."""
    if isinstance(was, dict) and isinstance(now, dict) and was.keys() == now.keys():
        for key in was:
            yield from _unlike(was[key], now[key], f"{place} {key}")
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for n, pair in enumerate(zip(was, now, strict=True)):
            yield from _unlike(*pair, f"{place} {n}")
    elif was != now:
        yield place, (was, now)


def _kind(text: str) -> list[str]:
    """The exit status and the class of an error, whose words may change; all of anything else."""
    return re.findall(r"^\d+|\w+Error(?=: )", text) if text[:1].isdigit() else [text]


def _plain(text: str, folder: Path) -> str:
    """Without what lies elsewhere in the other record."""
    for before, after in RENAMED.items():
        text = text.replace(before, after)
    return re.sub(r"\d+(\.\d+)? s\b", "", text.replace(str(folder), "FOLDER"))


def _packed(folder: Path, of: Path) -> dict[str, Any]:
    import pyarrow.parquet as pq

    columns = ["id", "segment", "length", "supervised", "tokens", "loss_spans"]
    found: dict[str, Any] = {}
    for path in folder.rglob("sequences.parquet"):  # of the case, and of the sample's held-out trajectories
        found.setdefault(path.relative_to(folder).parts[0], []).append(pq.read_table(path, columns=columns).to_pylist())
    return {case: sorted(tables, key=str) for case, tables in found.items()}


def _plans(folder: Path, of: Path) -> dict[str, Any]:
    return {
        p.parent.name: _without(json.loads(_plain(p.read_text(encoding="utf-8"), of)))
        for p in folder.rglob("plan.json")
    }


def _runs(folder: Path, of: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for run in sorted(folder.iterdir()):
        if (job := run / "job.json").is_file():
            checkout = json.loads(job.read_text(encoding="utf-8"))["env_vars"]["PYTHONPATH"].split(":")[0]
            found[f"{run.name} argv"] = json.loads(
                _plain(job.read_text(encoding="utf-8").replace(checkout, "CHECKOUT"), of)
            )["argv"]
        if (metrics := run / "metrics.jsonl").is_file():
            lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
            found[f"{run.name} metrics"] = [{k: v for k, v in line.items() if k != "time"} for line in lines]
        for file in sorted((run / "hf").glob("*.safetensors")):
            found[f"{run.name} {file.name}"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without(v) for k, v in value.items() if k not in _APART}
    return [_without(v) for v in value] if isinstance(value, list) else value


def main() -> int:
    words = argparse.ArgumentParser()
    words.add_argument("checkouts", type=Path, nargs="*", help="OLD NEW")
    words.add_argument("--record", type=Path, help="record the checkout at hand in this folder")
    words.add_argument("--no-training", action="store_true")
    given = words.parse_args()
    if given.record:
        record(given.record.resolve(), not given.no_training)
        return 0
    folders = [checkout.resolve() / "record" for checkout in given.checkouts]
    for checkout, folder in zip(given.checkouts, folders, strict=True):
        if not (folder / "said.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            command = [".venv/bin/python", str(Path(__file__).resolve()), "--record", str(folder)]
            subprocess.run([*command, *(["--no-training"] if given.no_training else [])], cwd=checkout, check=True)
    found = [*differences(*folders)]
    print("\n".join(found) or "no difference")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
