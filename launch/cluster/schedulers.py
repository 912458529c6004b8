"""A run for a scheduler: an sbatch script for Slurm or a RayJob manifest for Kubernetes. Both start Ray themselves.

All numbers and overrides come from the recipe. Site-specific choices (partition, account, time limit, image tag) are options
of sbatch, or names in the manifest.
"""

import re
import shlex
from typing import Any

import yaml

from launch.cluster.submit import entrypoint, env_vars, metadata
from recipes.config import Recipe
from recipes.errors import ConfigError
from recipes.paths import REPO, local_root

IMAGE = "slimerl/slime"
CLAIM = "limi"  # the volume that holds cluster.root

_SLURM = """\
#!/bin/bash
#SBATCH --job-name=limi-{run}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --exclusive
# Site-specific choices are options of sbatch. --signal stops training cleanly 600 s before the time limit; the next job resumes
# from the last checkpoint (engine.save_steps):
#   sbatch --partition=NAME --account=NAME --time=24:00:00 --signal=B:TERM@600 THIS_FILE
# Nodes run their installed software, or a container if they have Pyxis: LIMI_IMAGE={image} sbatch THIS_FILE
# Keys of the Hub and of W&B come from the environment of sbatch.
set -euo pipefail

checkout={checkout}
root={root}
mkdir -p "$root"
cd "$checkout"
container=()
if [[ -n "${{LIMI_IMAGE:-}}" ]]; then
    container=(--container-image="$LIMI_IMAGE" --container-mounts="$checkout:$checkout,$root:$root" --container-workdir="$checkout")
elif [[ -d .venv ]]; then
    export PATH="$checkout/.venv/bin:$PATH"
fi

# A private token for this job: others on the network cannot use its Ray.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# On the head node, next to the steps that already run there, with all its cores.
on_head=(srun --overlap --cpu-bind=none --nodes=1 --ntasks=1 --nodelist="$head" "${{container[@]}}")
ray=()
end() {{
    kill "${{ray[@]}}" 2>/dev/null || true
    wait
}}
trap end EXIT
"${{on_head[@]}}" ray start --head --block --port={port} --dashboard-port={dashboard} --num-gpus={gpus} &
ray+=($!)
{workers}
# Wait until every GPU has joined the cluster.
"${{on_head[@]}}" python3 - "$head:{port}" {all_gpus} {timeout} <<'PYTHON' &
import sys, time
import ray

address, wanted, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
deadline, joined = time.monotonic() + seconds, 0
while joined < wanted:
    if time.monotonic() > deadline:
        sys.exit(f"{{joined}} of {{wanted}} GPUs are in the cluster after engine.timeout={{seconds}} s")
    time.sleep(2)
    try:
        ray.init(address=address, logging_level="ERROR", log_to_driver=False)
        joined = int(ray.cluster_resources().get("GPU", 0))
        ray.shutdown()
    except ConnectionError:
        pass  # the head is not up yet
PYTHON
ray+=($!)
wait -n "${{ray[@]}}" # the first process to end: the wait for GPUs, or a node that cannot start

limi=("${{on_head[@]}}" python3 launch/limi.py)
cluster=cluster.address=http://127.0.0.1:{dashboard}
trap '"${{limi[@]}}" stop run={run} "$cluster" || true' TERM
"${{limi[@]}}" train {words} "$cluster" &
job=$!
status=0
wait "$job" || status=$?
while kill -0 "$job" 2>/dev/null; do wait "$job" || status=$?; done # a signal ends the first wait, not the job
exit "$status"
"""

_WORKERS = """\
srun --overlap --cpu-bind=none --nodes={others} --ntasks={others} --exclude="$head" "${{container[@]}}" \\
    ray start --block --address="$head:{port}" --num-gpus={gpus} &
ray+=($!)
"""


def slurm(recipe: Recipe) -> str:
    """Return an sbatch script that starts Ray on every node and runs the recipe as a Ray job.

    Raise `ConfigError` for cluster=local, or if cluster.root is not given for the nodes.
    """
    _check(recipe, "slurm")
    c = recipe.cluster
    numbers = {"gpus": c.gpus_per_node, "port": 6379, "others": c.nodes - 1}
    words = [w for w in recipe.overrides if not w.startswith("cluster.address=")]
    return _SLURM.format(
        **numbers,
        run=recipe.run,
        nodes=c.nodes,
        all_gpus=c.nodes * c.gpus_per_node,
        dashboard=8265,
        timeout=recipe.engine.timeout,
        image=IMAGE,
        checkout=shlex.quote(str(REPO)),
        root=shlex.quote(c.root),
        workers=_WORKERS.format(**numbers) if c.nodes > 1 else "",
        words=shlex.join(words),
    )


def kuberay(recipe: Recipe) -> str:
    """Return a RayJob manifest with a head without GPUs and one worker per node. Raise `ConfigError` as `slurm` does."""
    _check(recipe, "kuberay")
    c = recipe.cluster
    checkout = f"{c.root.rstrip('/')}/checkout"
    name = re.sub("[^a-z0-9]+", "-", f"limi-{recipe.run.lower()}")[:47].strip("-")  # KubeRay's limit
    workers = {
        "groupName": "gpu",
        "replicas": c.nodes,
        "minReplicas": c.nodes,
        "maxReplicas": c.nodes,
        "rayStartParams": {},
        "template": _pod(recipe, {"limits": {"nvidia.com/gpu": c.gpus_per_node}}),
    }
    spec = {
        # The other modes pass the entry point through a shell more than once, which breaks its quoting.
        "submissionMode": "HTTPMode",
        "entrypoint": entrypoint("train", recipe, f"{checkout}/launch/limi.py"),
        "metadata": metadata("train", recipe),
        "runtimeEnvYAML": yaml.safe_dump({"env_vars": env_vars(recipe)}),
        "shutdownAfterJobFinishes": True,
        "rayClusterSpec": {
            "headGroupSpec": {
                "rayStartParams": {"dashboard-host": "0.0.0.0", "num-gpus": "0"},  # noqa: S104 - inside the pod's network
                "template": _pod(recipe, {}),
            },
            "workerGroupSpecs": [workers],
        },
    }
    manifest = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": name}, "spec": spec}
    return (
        f"# For `kubectl apply -f` on a cluster with KubeRay. It needs a ReadWriteMany PersistentVolumeClaim '{CLAIM}',\n"
        f"# which is mounted at {c.root} and holds a clone of this repository in {checkout}.\n"
        f"# Keys of the Hub and of W&B come from the Secret '{CLAIM}' if it exists.\n"
        + yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True, width=10**6)
    )


def _pod(recipe: Recipe, resources: dict[str, Any]) -> dict[str, Any]:
    """Return a pod template: the image, the shared volume, shared memory, and permission to lock memory for RDMA."""
    container = {
        "name": "ray",
        "image": IMAGE,
        "resources": resources,
        "envFrom": [{"secretRef": {"name": CLAIM, "optional": True}}],
        "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}},
        "volumeMounts": [
            {"name": "root", "mountPath": recipe.cluster.root},
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 - the pod's
        ],
    }
    volumes = [
        {"name": "root", "persistentVolumeClaim": {"claimName": CLAIM}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]
    return {"spec": {"containers": [container], "volumes": volumes}}


def _check(recipe: Recipe, target: str) -> None:
    c = recipe.cluster
    if c.name == "local":
        raise ConfigError(
            f"cluster=local is this machine, but {target} needs nodes",
            "write cluster=h100x8, or another cluster with GPUs",
        )
    if c.root == local_root() and not any(w.startswith("cluster.root=") for w in recipe.overrides):
        raise ConfigError(
            f"{target} runs on other machines",
            "write cluster.root=FOLDER on the command line, with a folder that every node sees",
        )
