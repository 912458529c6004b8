"""`make kuberay`: the RayJob manifest of a run, for KubeRay on Kubernetes."""

import hashlib
import re
from typing import Any

import ray
import yaml

from launch.cluster.image.pins import IMAGE
from launch.cluster.schedulers.required import check_cluster
from launch.cluster.submit import entrypoint, env_vars, metadata
from recipes.config import Recipe

CLAIM = "limi"  # the volume that holds cluster.root
NAME = 47  # most characters of a RayJob's name
_HASH = 8
_CPUS_PER_GPU = 8  # that a pod asks for if cluster.cpus_per_node is not set
_HEAD = {"cpu": "8", "memory": "32Gi"}  # Ray's head and the driver


def kuberay(recipe: Recipe) -> str:
    """Return a RayJob manifest with a head without GPUs and one worker per node.

    Raise `ConfigError` for cluster=local, or if cluster.root is not given for the nodes.
    """
    check_cluster(recipe, "kuberay")
    c = recipe.cluster
    checkout = f"{c.root.rstrip('/')}/checkout"
    workers = {
        "groupName": "gpu",
        "replicas": c.nodes,
        "minReplicas": c.nodes,
        "maxReplicas": c.nodes,
        "rayStartParams": {},
        "template": _pod(recipe, _worker(recipe)),
    }
    spec = {
        # The other modes pass the entry point through a shell more than once, which breaks its quoting.
        "submissionMode": "HTTPMode",
        "entrypoint": entrypoint("train", recipe, f"{checkout}/launch/limi.py"),
        "metadata": metadata("train", recipe),
        "runtimeEnvYAML": yaml.safe_dump({"env_vars": env_vars(recipe)}),
        "shutdownAfterJobFinishes": True,
        "rayClusterSpec": {
            "rayVersion": ray.__version__,
            "headGroupSpec": {
                "rayStartParams": {"dashboard-host": "0.0.0.0", "num-gpus": "0"},  # noqa: S104 - inside the pod's network
                "template": _pod(recipe, _HEAD),
            },
            "workerGroupSpecs": [workers],
        },
    }
    manifest = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": name(recipe.run)}, "spec": spec}
    return (
        f"# For `kubectl apply -f` on a cluster with KubeRay. It needs a ReadWriteMany PersistentVolumeClaim '{CLAIM}',\n"
        f"# which is mounted at {c.root} and holds a clone of this repository in {checkout}.\n"
        f"# Keys of the Hub and of W&B come from the Secret '{CLAIM}' if it exists.\n"
        "# rayVersion is this checkout's; if the image has another, write that one:\n"
        f"# docker run --rm {IMAGE} python3 -c 'import ray; print(ray.__version__)'\n"
        + yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True, width=10**6)
    )


def name(run: str) -> str:
    """Return the manifest's name: the run's in Kubernetes' letters, and a hash, so that two runs never have the same."""
    key = hashlib.sha256(run.encode()).hexdigest()[:_HASH]
    letters = re.sub("[^a-z0-9]+", "-", f"limi-{run.lower()}")[: NAME - _HASH - 1].strip("-")
    return f"{letters}-{key}"


def _worker(recipe: Recipe) -> dict[str, Any]:
    """Return the resources of a node's pod. Requests and limits are the same, so that no other pod shares the node's memory."""
    c = recipe.cluster
    wanted: dict[str, Any] = {"cpu": str(c.cpus_per_node or _CPUS_PER_GPU * c.gpus_per_node)}
    if c.host_memory_gb is not None:
        wanted["memory"] = f"{int(0.9 * c.host_memory_gb)}G"  # the rest is the node's own
    wanted["nvidia.com/gpu"] = c.gpus_per_node
    if c.rdma_resource is not None:
        wanted[c.rdma_resource] = c.gpus_per_node
    return wanted


def _pod(recipe: Recipe, resources: dict[str, Any]) -> dict[str, Any]:
    """Return a pod template: the image, the shared volume, shared memory, and permission to lock memory for RDMA."""
    container = {
        "name": "ray",
        "image": IMAGE,
        "resources": {"requests": {**resources}, "limits": {**resources}},
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
    network = {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"} if recipe.cluster.host_network else {}
    return {"spec": {**network, "containers": [container], "volumes": volumes}}
