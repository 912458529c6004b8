"""Checks of the cluster's nodes, from their own reports (`node_report.report`)."""

from typing import Any

from launch.cluster.image.pins import IMAGE, MEGATRON, NUMPY, PACKAGES, PINNED, TRANSFORMER_ENGINE, VERSIONS, version_of
from launch.preflight.checklist import Found, check
from launch.slime.arguments import on_cpu
from recipes.config import Recipe

# Bytes of /dev/shm per GPU, an allowance for NCCL's buffers and Ray's objects; Docker's default is 64 MB in all.
SHM = 10**9
IN_IMAGE = f"run slime's image {IMAGE} there"
_IMAGES = " or ".join(f"{version.image} ({version.name})" for version in VERSIONS if version.image)
CHECKED = (
    f"run one of slime's images on every node, {_IMAGES}; or check out slime {PINNED.commits[0][:7]} and Megatron-LM "
    f"{MEGATRON[:7]} with slime's patches"
)
Reports = dict[str, dict[str, Any]]  # `node_report.report` by node


NOT_ON_CPU = Found("not on a CPU", judged=False)


@check("numpy", "an assertion that stops slime at its start")
def numpy(r: Recipe, reports: Reports) -> Found:
    here = {name: str(report["versions"]["numpy"]) for name, report in reports.items()}
    good = {*here.values()} == {NUMPY}
    fix = (
        "write SLIME_ROOT=FOLDER MEGATRON_ROOT=FOLDER on make's line: it sets up a Python with it"
        if on_cpu(r)
        else f"on these nodes: python3 -m pip install numpy=={NUMPY}, or {IN_IMAGE}"
    )
    return Found(listed(here), NUMPY, "" if good else fix)


@check("software", "ranks that cannot talk to one another")
def software(reports: Reports) -> Found:
    here = {}
    for name, report in reports.items():
        versions = report["versions"]
        here[name] = f"python {report['python']}, torch {versions['torch']}, ray {versions['ray']}"
    good = len({*here.values()}) == 1 and "None" not in next(iter(here.values()))
    return Found(listed(here), "the same on all nodes", "" if good else f"use the same image on all nodes: {IN_IMAGE}")


@check("Transformer Engine", "layers and attention that slime's GPU path does not have")
def transformer_engine(r: Recipe, reports: Reports) -> Found:
    if on_cpu(r):
        return NOT_ON_CPU
    here = {name: str(report["versions"]["transformer_engine"]) for name, report in reports.items()}
    good = all(version.split("+")[0] == TRANSFORMER_ENGINE for version in here.values())
    return Found(listed(here), TRANSFORMER_ENGINE, "" if good else IN_IMAGE)


@check("slime", "another slime version than those that the project was checked with")
def slime(r: Recipe, reports: Reports) -> Found:
    root = str(r.engine.slime_root)
    here = {at: str(report["slime"]) for at, report in reports.items()}
    limit = ", ".join(f"{version.commits[0][:7]} ({version.name})" for version in VERSIONS)
    if any(commit.startswith("no folder") for commit in here.values()):
        return Found(listed(here), limit, f"write engine.slime_root=FOLDER of a checkout of it, or {IN_IMAGE}")
    if len({*here.values()}) > 1:
        return Found(
            listed(here), "the same on all nodes", f"git -C {root} checkout {PINNED.commits[0]}, or {IN_IMAGE}"
        )
    commit = next(iter(here.values()))
    if version := version_of(commit):
        return Found(f"{commit[:7]}, {version.name}", limit)
    keep = f"nothing is to be done if the row 'contract' is kept; otherwise {CHECKED}"
    return Found(f"{commit}, with which the project was not checked", limit, keep, odd=True)


@check("Megatron-LM", "another Megatron-LM version, or one without slime's patches")
def megatron(r: Recipe, reports: Reports) -> Found:
    root, limit = str(r.engine.megatron_root), MEGATRON[:7]
    here = {at: str(report["megatron"]) for at, report in reports.items()}
    if wrong := {found for found in here.values() if found != MEGATRON}:
        elsewhere = f"write engine.megatron_root=FOLDER of a checkout of it, or {IN_IMAGE}"
        there = all(" " not in found for found in wrong)  # all are commits, not reasons why there is none
        return Found(listed(here), limit, f"git -C {root} checkout {MEGATRON}, or {elsewhere}" if there else elsewhere)
    if any(str(report["slime"]).startswith("no folder") for report in reports.values()):
        return Found(f"{limit}; its patches are compared once slime is there", limit, judged=False)
    if any(report["patches"] is None for report in reports.values()):
        restore = f"git -C {r.engine.slime_root} checkout -- docker/patch, or {IN_IMAGE}"
        return Found("slime's patches were not found", limit, restore)
    if lacking := {n: ", ".join(p) for n, report in reports.items() if (p := report["patches"])}:
        patch = f"git -C {root} apply {r.engine.slime_root}/docker/patch/latest/megatron*.patch"
        return Found(f"without {listed(lacking)}", limit, f"{patch}, or {IN_IMAGE}")
    return Found(f"{limit}, patched", limit)


@check("contract", "a changed name, signature or text in slime or Megatron-LM that fails in the middle of a run")
def contract(reports: Reports) -> Found:
    here = {name: "; ".join(report["broken"]) or "kept" for name, report in reports.items()}
    limit = "as at the commits that the project was checked with"
    good = {*here.values()} == {"kept"}
    return Found(listed(here), limit, "" if good else CHECKED)


@check("packages", "an import that fails inside slime")
def packages(reports: Reports) -> Found:
    lacking = {name: ", ".join(report["missing"]) for name, report in reports.items() if report["missing"]}
    if not lacking:
        return Found(f"{len(PACKAGES)} of {len(PACKAGES)}", "imported")
    names = sorted({word.split(" (")[0] for report in reports.values() for word in report["missing"]})
    wanted = " ".join(PACKAGES[name] for name in names)
    return Found(
        f"not {listed(lacking)}", "imported", f"on these nodes: python3 -m pip install {wanted} numpy=={NUMPY}"
    )


@check("files", "nodes that do not see the checkpoint or the data")
def files(r: Recipe, reports: Reports, paths: list[str]) -> Found:
    """paths: the paths that the reports cover; None, if not all exist on this machine, leaves the check unjudged."""
    unseen = {name: ", ".join(report["unseen"]) for name, report in reports.items() if report["unseen"]}
    fix = "write model.checkpoint=FOLDER and data.out=FOLDER on the file system that every node sees"
    if unseen:
        return Found(f"not seen: {listed(unseen)}", "on every node", fix)
    return Found("model.checkpoint and data.out are seen", "on every node")


@check("shared memory", "NCCL and Ray without space for data that processes of a node share")
def shared_memory(r: Recipe, reports: Reports) -> Found:
    least, needed = min(report["shm"] for report in reports.values()), SHM * r.cluster.gpus_per_node
    text, limit = f"at least {least / 1e9:,.1f} GB of /dev/shm free", f"{needed / 1e9:g} GB: 1 per GPU"
    if on_cpu(r):
        return Found(f"{text}; not on a CPU", limit, judged=False)
    return Found(
        text, limit, "" if least >= needed else f"docker run --shm-size={needed // 10**9}g or more, on that node"
    )


@check("locked memory", "InfiniBand that NCCL cannot use")
def locked_memory(r: Recipe, reports: Reports) -> Found:
    if on_cpu(r):
        return NOT_ON_CPU
    here = {n: "unlimited" if (m := x["memlock"]) is None else f"{m / 1e6:,.2f} MB" for n, x in reports.items()}
    if r.cluster.nodes == 1 or not any(report["infiniband"] for report in reports.values()):
        return Found(f"{listed(here)}; one node, or no InfiniBand", "unlimited with InfiniBand", judged=False)
    good = {*here.values()} == {"unlimited"}
    return Found(
        listed(here),
        "unlimited",
        "" if good else "docker run --ulimit memlock=-1, or ulimit -l unlimited before ray start",
    )


@check("Weights & Biases", "metrics that nobody sees")
def wandb(r: Recipe, reports: Reports) -> Found:
    if r.engine.wandb is None:
        return Found("engine.wandb is not set", judged=False)
    without = [name for name, report in reports.items() if not report["wandb"]]
    if without:
        fix = "export WANDB_API_KEY=... before ray start on these nodes, or write engine.wandb=null"
        return Found(f"no WANDB_API_KEY on {', '.join(without)}", "on every node", fix)
    return Found("WANDB_API_KEY is set", "on every node")


def listed(values: dict[str, str]) -> str:
    """Return the values as text, with nodes of the same value grouped together."""
    by_value: dict[str, list[str]] = {}
    for name, value in values.items():
        by_value.setdefault(value, []).append(name)
    if len(by_value) == 1:
        return f"{next(iter(by_value))}{f' on all {len(values)} nodes' if len(values) > 1 else ''}"
    return "; ".join(f"{value} on {', '.join(names)}" for value, names in by_value.items())
