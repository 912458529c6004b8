"""The RayJob manifest: what it asks for, and that the words arrive in the job as they were typed."""

import copy
import json
import os
import re
import subprocess
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

from launch.cluster.image.pins import IMAGE
from launch.cluster.schedulers.kuberay import kuberay
from recipes.compose.recipe import compose_recipe
from tests.launch.cluster.schedulers.test_slurm import ADDRESS, WORDS
from tests.launch.support import called
from tests.make import saying


def manifest(*words):
    return yaml.safe_load(kuberay(compose_recipe(words)))


def pods(made):
    spec = made["spec"]["rayClusterSpec"]
    (workers,) = spec["workerGroupSpecs"]
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], workers)]


def test_the_manifest_asks_for_the_recipes_nodes_and_its_folder():
    made = manifest(*WORDS)
    spec = made["spec"]["rayClusterSpec"]
    (workers,) = spec["workerGroupSpecs"]
    assert [workers[k] for k in ("replicas", "minReplicas", "maxReplicas")] == [8, 8, 8]
    assert spec["rayVersion"] == ray.__version__
    assert spec["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0"
    head, worker = (pod["containers"][0] for pod in pods(made))
    wanted = {"cpu": "64", "memory": "1843G", "nvidia.com/gpu": 8}
    assert worker["resources"] == {"requests": wanted, "limits": wanted}
    assert set(head["resources"]["requests"]) == {"cpu", "memory"}
    for container in (head, worker):
        assert container["image"] == IMAGE and ":" in IMAGE
        assert {m["mountPath"] for m in container["volumeMounts"]} == {"/shared/a b", "/dev/shm"}
        assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
    assert not any("hostNetwork" in pod for pod in pods(made))


def test_rdma_cores_and_the_hosts_network_are_options():
    made = manifest(*WORDS, "cluster.rdma_resource=rdma/hca", "cluster.cpus_per_node=96", "cluster.host_network=true")
    for pod in pods(made):
        assert pod["hostNetwork"] is True and pod["dnsPolicy"] == "ClusterFirstWithHostNet"
    limits = pods(made)[1]["containers"][0]["resources"]["limits"]
    assert limits["rdma/hca"] == 8 and limits["cpu"] == "96"


def test_the_manifests_entry_point_hands_the_words_on_as_typed(tmp_path):
    entrypoint = manifest(*WORDS, ADDRESS)["spec"]["entrypoint"]
    saying(tmp_path / "python3")
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(entrypoint, shell=True, env=env, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["/shared/a b/checkout/launch/limi.py", "train", *WORDS]


@pytest.mark.parametrize("name", ["A" * 100, "1.2_3", "-x-"])
def test_the_manifests_name_is_kubernetes(name):
    made = manifest("model=qwen3-4b", "cluster.root=/shared", f"run={name}")
    assert re.fullmatch("[a-z]([-a-z0-9]{0,45}[a-z0-9])?", made["metadata"]["name"])
    assert made["spec"]["metadata"]["limi_run"] == name


def test_no_two_runs_have_one_name():
    runs = ["a", "A", "a.1", "a-1", "a_1", "x" * 60, "x" * 61]
    names = {manifest("model=qwen3-4b", "cluster.root=/shared", f"run={run}")["metadata"]["name"] for run in runs}
    assert len(names) == len(runs)


def strict(schema):
    """Return a schema that refuses every field it does not name, as the API server does with `--validate=strict`."""
    schema = copy.deepcopy(schema)

    def close(one):
        if isinstance(one, dict):
            if "properties" in one and not one.get("x-kubernetes-preserve-unknown-fields"):
                one.setdefault("additionalProperties", False)
            if one.get("x-kubernetes-int-or-string"):
                one.clear()
            for value in one.values():
                close(value)
        elif isinstance(one, list):
            for value in one:
                close(value)

    close(schema)
    return schema


@pytest.mark.parametrize("words", [WORDS, [*WORDS, "cluster.rdma_resource=rdma/hca", "cluster.host_network=true"]])
def test_kuberay_s_own_schema_takes_it_and_no_field_is_unknown(words):
    if "KUBERAY_CRD" not in os.environ:
        pytest.skip("KUBERAY_CRD is not set: the file ray.io_rayjobs.yaml of KubeRay")
    definition = yaml.safe_load(Path(os.environ["KUBERAY_CRD"]).read_text())
    schema = strict(next(v["schema"]["openAPIV3Schema"] for v in definition["spec"]["versions"] if v["name"] == "v1"))
    schema["properties"]["metadata"] = {"type": "object"}
    made = manifest(*words)
    jsonschema.validate(made, schema)
    made["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["hostNetwrok"] = True
    with pytest.raises(jsonschema.ValidationError, match="hostNetwrok"):
        jsonschema.validate(made, schema)


def test_only_the_manifest_is_printed():
    words = ["model=glm4.5", "cluster.root=/shared"]
    done = called("kuberay", *words)
    assert done.returncode == 0 and not done.stderr
    assert done.stdout == kuberay(compose_recipe(words)) and done.stdout.startswith("# For `kubectl apply -f`")
