"""`make fetch`: a model of the hub, which a server on loopback plays, whole on this machine and every file proved."""

import hashlib
import json
import os
import random
import subprocess
import sys

import pytest

from data_prep.hub import File
from launch.run import fetch_models
from recipes.compose.recipe import compose_recipe
from recipes.errors import ConfigError
from tests.conftest import REPO
from tests.hub import COMMIT, Hub, Repo
from tests.launch.support import called, limi

MODEL = "org/tiny"
TOKEN = "hf_secretsecretsecret"
WEIGHTS = random.Random(0).randbytes(4 << 20)
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b'{"model": {}}',
    "merges.txt": b"a b",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors.index.json": b"{}",
    "model-1-of-2.safetensors": WEIGHTS,
    "model-2-of-2.safetensors": b"",
}
LEFT = {
    "modeling_tiny.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
    "consolidated.pt": b"pickle",
    "onnx/model.safetensors": b"elsewhere",
    "limi.json": b"theirs",
    "README.md": b"# Tiny",
}


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    hub.repos[f"models/{MODEL}"] = Repo(FILES | LEFT)
    hub.here(monkeypatch)
    yield hub
    hub.close()


@pytest.fixture
def repo(hub):
    return hub.repos[f"models/{MODEL}"]


def environment(hub, **more):
    """What the command is run in: the hub, and a home without a token of the user's."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    ours = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": "/dev/null/home", "HF_TOKEN": TOKEN}
    return clean | ours | {"HF_HUB_DISABLE_TELEMETRY": "1"} | more  # telemetry would ask the hub for more


def fetched_by(hub, root, *words, command=called, **env):
    done = command("fetch", f"cluster.root={root}", f"model.checkpoint={MODEL}", *words, env=environment(hub, **env))
    assert TOKEN not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "SIGNED" not in done.stderr
    return done


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_model_is_fetched_whole_and_once(hub, tmp_path):
    done = fetched_by(hub, tmp_path, command=limi)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "models" / "org--tiny"
    there = files_of(folder)
    record = json.loads(there.pop("limi.json"))
    assert there == FILES, "no code, no pickles, nothing of its folders, nothing unfinished"
    assert (record["id"], record["commit"]) == (MODEL, COMMIT)
    assert record["files"] == {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in FILES.items()
    }
    assert str(folder) in done.stdout
    assert {(host.partition(":")[0], known) for host, _, known in hub.asked} == {
        ("127.0.0.1", True),
        ("localhost", False),  # where large files lie does not see the token
    }

    hub.close()
    again = fetched_by(hub, tmp_path)
    assert again.returncode == 0, again.stderr


def test_without_a_token_none_is_sent(hub, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(TOKEN)  # as `hf auth login` leaves it
    done = fetched_by(hub, tmp_path, command=limi, HF_TOKEN="", HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert not any(known for _, _, known in hub.asked)


def test_a_broken_connection_goes_on_at_its_byte(hub, repo, tmp_path):
    repo.cut["model-1-of-2.safetensors"] = [5 << 19]
    done = fetched_by(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "models" / "org--tiny")["model-1-of-2.safetensors"] == WEIGHTS
    assert len(WEIGHTS) <= hub.sent["model-1-of-2.safetensors"] <= len(WEIGHTS) + (1 << 20)


@pytest.mark.parametrize("how", [pytest.param("server", marks=pytest.mark.slow), "kill"])
def test_an_interrupted_fetch_goes_on_at_its_byte_and_commit(hub, repo, tmp_path, how):
    name = "model-1-of-2.safetensors"
    folder = tmp_path / "models" / "org--tiny"
    if how == "server":
        repo.cut[name] = [5 << 19] + [0] * 20
        done = fetched_by(hub, tmp_path)
        assert done.returncode == 2
        assert f"the hub at {hub.endpoint} could not be reached for the model org/tiny" in done.stderr
        assert "the same command goes on from what has come" in done.stderr
    else:
        repo.stalled[name] = 5 << 19
        words = ["launch/limi.py", "fetch", f"cluster.root={tmp_path}", f"model.checkpoint={MODEL}"]
        process = subprocess.Popen([sys.executable, *words], cwd=REPO, env=environment(hub), stderr=subprocess.DEVNULL)
        assert hub.stalling.wait(60)
        wait_until(lambda: any(p.stat().st_size >= 2 << 20 for p in (folder / ".partial").glob("[0-9a-f]*")), process)
        process.kill()
        process.wait()
    assert not (folder / "limi.json").exists()
    kept = max(p.stat().st_size for p in (folder / ".partial").iterdir())
    assert 2 << 20 <= kept < len(WEIGHTS)

    repo.cut.clear()
    repo.stalled.clear()
    hub.sent.clear()
    repo.commits.append("b" * 40)
    done = fetched_by(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert hub.sent == {name: len(WEIGHTS) - kept} | {n: s for n, s in hub.sent.items() if n != name}
    record = json.loads((folder / "limi.json").read_text())
    assert (record["commit"], record["files"][name]["sha256"]) == (COMMIT, hashlib.sha256(WEIGHTS).hexdigest())


def wait_until(holds, process):
    import time

    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["model-1-of-2.safetensors", "tokenizer.json"])
def test_a_damaged_file_is_removed_and_fetched_again(hub, repo, tmp_path, name):
    repo.spoiled.add(name)
    done = fetched_by(hub, tmp_path)
    assert done.returncode == 2
    assert f"PreflightError: {name} of org/tiny is not the file that the hub lists" in done.stderr
    assert "it was removed, and the same command fetches it again" in done.stderr
    folder = tmp_path / "models" / "org--tiny"
    assert not (folder / name).exists()
    assert not (folder / "limi.json").exists()

    repo.spoiled.clear()
    done = fetched_by(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (folder / name).read_bytes() == FILES[name]


def test_a_file_lost_since_is_fetched_again_at_the_recorded_commit(hub, repo, tmp_path):
    assert fetched_by(hub, tmp_path).returncode == 0
    folder = tmp_path / "models" / "org--tiny"
    (folder / "merges.txt").unlink()
    repo.commits.append("b" * 40)
    hub.sent.clear()
    done = fetched_by(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(hub.sent) == {"merges.txt"}
    assert json.loads((folder / "limi.json").read_text())["commit"] == COMMIT


@pytest.mark.parametrize("token", ["", TOKEN])
def test_a_missing_model_is_refused(hub, tmp_path, token):
    done = fetched_by(hub, tmp_path, "model.checkpoint=org/none", HF_TOKEN=token)
    assert done.returncode == 2
    may = "the token in HF_TOKEN may not read it" if token else "HF_TOKEN is not set"
    assert f"PreflightError: the hub has no model org/none, or it is private and {may}" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("token", "status", "says"),
    [
        ("", 401, "is gated, and HF_TOKEN is not set; accept its terms"),
        (TOKEN, 403, "is gated, and the token in HF_TOKEN may not read it; accept its terms"),
    ],
)
def test_a_gated_model_is_refused(hub, repo, tmp_path, token, status, says):
    repo.refused = dict.fromkeys(repo.files, (status, "GatedRepo"))
    done = fetched_by(hub, tmp_path, HF_TOKEN=token)
    assert done.returncode == 2
    assert f"PreflightError: the model org/tiny {says}" in done.stderr


def test_another_refusal_is_shown_without_the_signature_of_its_address(hub, repo, tmp_path):
    repo.refused["model-1-of-2.safetensors"] = (410, "Gone")
    done = fetched_by(hub, tmp_path)
    assert done.returncode == 2
    assert f"the hub at {hub.endpoint} did not give the model org/tiny: Client error '410" in done.stderr
    assert f"{hub.store}/{MODEL}/resolve" in done.stderr


def test_no_hub_is_said_at_once(hub, tmp_path):
    hub.close()
    done = fetched_by(hub, tmp_path)
    assert done.returncode == 2
    assert f"the hub at {hub.endpoint} could not be reached for the model org/tiny" in done.stderr
    done = fetched_by(hub, tmp_path, command=limi, HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert "HF_HUB_OFFLINE is set, and the model org/tiny is not on this machine" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_token_that_no_header_holds_is_not_shown(hub, tmp_path):
    done = fetched_by(hub, tmp_path, HF_TOKEN=f"{TOKEN}\nsecond")
    assert done.returncode == 2
    assert "PreflightError: HF_TOKEN contains blanks" in done.stderr


def test_a_model_with_code_of_its_own_is_refused_before_its_weights(hub, repo, tmp_path):
    repo.files["config.json"] = b'{"auto_map": {"AutoModel": "modeling_tiny.Tiny"}}'
    done = fetched_by(hub, tmp_path)
    assert done.returncode == 2
    assert "config.json of org/tiny has auto_map={'AutoModel': 'modeling_tiny.Tiny'}" in done.stderr
    assert "trust_remote_code stays off" in done.stderr
    assert set(hub.sent) == {"config.json"}


def test_a_model_without_safetensors_is_refused(hub, repo, tmp_path):
    for name in [n for n in repo.files if n.endswith(".safetensors") and "/" not in n]:
        del repo.files[name]
    done = fetched_by(hub, tmp_path)
    assert done.returncode == 2
    assert "org/tiny on the hub has no config.json with safetensors next to it" in done.stderr


def test_a_disk_without_room_is_refused_before_the_weights(hub, repo, tmp_path):
    repo.sizes["model-1-of-2.safetensors"] = 10**18
    done = fetched_by(hub, tmp_path)
    assert done.returncode == 2
    assert "org/tiny needs 1,000,000,000.00 GB more" in done.stderr
    assert "GB free" in done.stderr
    assert "cluster.root=FOLDER on another disk" in done.stderr
    assert set(hub.sent) <= {"config.json"}


def test_a_second_process_does_not_write_the_same_files(hub, repo, tmp_path):
    repo.stalled["model-1-of-2.safetensors"] = 5 << 19
    words = ["launch/limi.py", "fetch", f"cluster.root={tmp_path}", f"model.checkpoint={MODEL}"]
    process = subprocess.Popen([sys.executable, *words], cwd=REPO, env=environment(hub), stderr=subprocess.DEVNULL)
    try:
        assert hub.stalling.wait(60)
        done = fetched_by(hub, tmp_path)
    finally:
        process.kill()
        process.wait()
    assert done.returncode == 2
    assert "another process is fetching org/tiny" in done.stderr


@pytest.mark.run
def test_what_is_fetched_is_used_without_the_hub(hub, bases, tmp_path):
    base = bases["qwen3-tiny"]
    sample = (REPO / "data_prep" / "sample" / "train.jsonl").read_bytes()
    hub.repos[f"models/{MODEL}"] = Repo({p.name: p.read_bytes() for p in base.iterdir()})
    hub.repos["datasets/org/data"] = Repo({"train.jsonl": sample, "README.md": b"x"})
    words = [f"cluster.root={tmp_path}", f"model.checkpoint={MODEL}", "data.path=org/data", "data.workers=1"]
    refused = called("data", *words, env=environment(hub))
    assert refused.returncode == 2
    assert f"run `make fetch cluster.root={tmp_path} model.checkpoint={MODEL} data.path=org/data" in refused.stderr

    done = called("fetch", *words, env=environment(hub))
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "data-sources" / "org--data") in done.stdout
    hub.close()
    before = files_of(tmp_path / "models" / "org--tiny")
    packed = limi("data", *words, env=environment(hub, HF_HUB_OFFLINE="1"))
    assert packed.returncode == 0, packed.stderr
    assert files_of(tmp_path / "models" / "org--tiny") == before, "a tiny model is not made over it"

    shown = called("train", *words, "dry_run=true", env=environment(hub))
    assert f"data     {tmp_path}/data-sources/org--data/train.jsonl and " in shown.stdout
    assert f"from {tmp_path}/models/org--tiny" in shown.stdout


def test_an_unfetched_model_is_named_with_the_command_that_fetches_it(tmp_path):
    recipe = compose_recipe(["model=qwen3-32b", f"cluster.root={tmp_path}", "run=ab"])
    assert fetch_models.fetched(recipe) == recipe
    with pytest.raises(ConfigError, match=rf"run `make fetch MODEL=qwen3-32b cluster\.root={tmp_path} run=ab`, or"):
        fetch_models.local_checkpoint(recipe)


def test_a_plan_needs_no_fetch(tmp_path):
    done = limi("plan", "model=qwen3-4b", f"cluster.root={tmp_path}", env=dict(os.environ) | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert "not on this machine: data.path=GAIR/LIMI and model.checkpoint=Qwen/Qwen3-4B" in done.stdout


def test_nothing_to_fetch_is_said(hub, tmp_path):
    done = called("fetch", f"cluster.root={tmp_path}", env=environment(hub))
    assert done.returncode == 2
    assert "nothing to fetch" in done.stderr


@pytest.mark.parametrize("size", [3, 4])
def test_a_file_is_proved_by_size_and_hash(tmp_path, size):
    (tmp_path / "f").write_bytes(b"abc")
    digest = hashlib.sha256(b"abc").hexdigest()
    blob = hashlib.sha1(b"blob 3\0abc").hexdigest()  # git hash-object
    for file in (File("f", size, digest, None), File("f", size, None, blob)):
        assert file.proved(tmp_path / "f") == (digest if size == 3 else None)
    assert File("f", 3, None, blob[::-1]).proved(tmp_path / "f") is None
    assert File("f", 3, digest[::-1], blob).proved(tmp_path / "f") is None
