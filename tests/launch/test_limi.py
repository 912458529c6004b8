"""The command line: what it takes, and that bad input ends with a clear error and nothing half-written."""

import json
import os
import re
import shlex
import socket

import pytest

from tests.conftest import REPO
from tests.launch.support import called
from tests.make import made, make, saying

SAMPLE = (REPO / "data_prep" / "sample" / "train.jsonl").read_text()
USER_ONLY = json.dumps({"messages": [{"role": "user", "content": "hi"}], "tools": []})


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["optim.lrr=1"], "write optim.lr=1"),
        (["+optim.lrr=1"], "write optim.lr=1"),
        (["optim.lr=fast"], "optim.lr=fast is not a number; write optim.lr=X, a number"),
        (["optim.lr=1e-5 optim.epochs=2"], "is 2 words in one; write optim.lr=1e-5 optim.epochs=2"),
        (
            ["--learning-rate", "1e-5"],
            "'--learning-rate 1e-5' is not name=value; here it is 'optim.lr': write optim.lr=1e-5",
        ),
        (["plan", "optim.lr=1,2"], " optim.lr=2 run=lr-2"),
        (["model=qwen4-tiny"], "model=qwen3-tiny"),
        (["layout.tp=3"], "does not divide the 4 attention heads; write layout.tp=2"),
        (["data.path=/nowhere.jsonl"], "no file '/nowhere.jsonl'; write data.path=FILE"),
    ],
)
def test_bad_words(tmp_path, words, says):
    done = called(f"cluster.root={tmp_path}", *words)
    assert done.returncode == 2
    assert says in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_bad_word_ends_the_process_without_a_traceback(tmp_path):
    done = called(f"cluster.root={tmp_path}", "trian")
    assert done.returncode == 2
    assert "the nearest is train" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (SAMPLE + "{oops\n", "line 21: json: not JSON"),
        (SAMPLE + USER_ONLY, "line 21: no_supervised: no assistant turn"),
    ],
)
def test_bad_data(root, bases, tmp_path, text, says):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    done = called(f"cluster.root={root}", "run=bad", f"data.path={path}", f"data.out={tmp_path}/out")
    assert done.returncode == 2
    assert says in done.stderr
    assert not (root / "runs" / "bad").exists()
    assert len(list(tmp_path.glob("out/*/ledger.jsonl"))) == 1, "the data set stays for its ledger"


def test_a_port_in_use_is_refused_before_anything_starts(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = called(f"cluster.root={tmp_path}", f"sanity.port={port}")
    assert done.returncode == 2
    assert f"sanity.port={port} cannot be used: Address already in use; write sanity.port=null" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_root_that_cannot_be_written_is_refused():
    done = called("cluster.root=/proc/limi")
    assert done.returncode == 2
    assert "cluster.root=FOLDER" in done.stderr


def test_a_dry_run_leaves_a_run_that_has_begun_as_it_is(tmp_path):
    words = ["model=qwen3-tiny", "engine=slime", f"cluster.root={tmp_path}", "run=begun", "dry_run=true"]
    run = tmp_path / "runs" / "begun"
    done = called(*words)
    assert done.returncode == 0, done.stderr
    assert f"job      {run / 'job.json'}" in done.stdout
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert "job.json" in before
    (run / "plan.json").write_text("{}")
    done = called(*words, "optim.lr=0.5")
    assert done.returncode == 0, done.stderr
    assert "--lr 0.5" in done.stdout and "has begun and keeps its own" in done.stdout
    assert {name: (run / name).read_bytes() for name in before} == before


def test_dry_run_prints_the_recipe_and_writes_nothing(tmp_path):
    done = called(f"cluster.root={tmp_path}", "dry_run=true", "optim.lr=2e-5", "model=glm4.5-tiny")
    assert done.returncode == 0
    assert "lr: 2.0e-05" in done.stdout
    assert "would run: train" in done.stdout
    assert not list(tmp_path.iterdir())


VALUES = ["/a b/c.jsonl", "/a,b", "/[1]", "/it's", '/"q"', "/$HOME/$(ls)", "/a(b)", "/x=y", "/%d", "/ü"]


def test_make_hands_every_override_on_as_typed(tmp_path):
    saying(made(tmp_path) / "bin" / "python")
    words = [f"name{n}={value}" for n, value in enumerate(VALUES)]
    done = make("data", f"VENV={tmp_path}", "MODEL=glm4.5-tiny", *words)
    assert done.returncode == 0, done.stderr
    program, stage, model, *others = json.loads(done.stdout)
    assert (program, stage, model) == ("launch/limi.py", "data", "model=glm4.5-tiny")
    assert sorted(others) == sorted(words)


@pytest.mark.parametrize("value", VALUES)
def test_an_override_s_value_is_taken_as_typed(value):
    done = called("train", "model=glm4.5-tiny", f"data.path={value}", "dry_run=true")
    assert done.returncode == 0, done.stderr
    assert f"data     {value} and " in done.stdout


def test_make_runs_the_recipe_of_its_words():
    done = make("train", "MODEL=glm4.5-tiny", f"data.path={VALUES[5]}", "dry_run=true", "optim.lr=2e-5")
    assert done.returncode == 0, done.stderr
    assert f"data     {VALUES[5]} and " in done.stdout
    assert "name: glm4.5-tiny" in done.stdout
    assert "lr: 2.0e-05" in done.stdout


def test_make_refuses_a_name_that_does_not_exist_and_fails():
    done = make("data", "+optim.lrr=1")
    assert done.returncode != 0
    assert "unknown option '+optim.lrr'" in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trian"], "'trian' is no stage and not name=value; the nearest is train"),
        (["train", "optim.lr", "1e-5"], "'optim.lr 1e-5' is not name=value; write optim.lr=1e-5"),
        (["train", "it's $HOME"], "'it's' is no stage"),
        (["train", "LR=1e-5"], "unknown option 'LR'; here it is 'optim.lr': write optim.lr=1e-5"),
        (["train", "MODEL="], "model='' is empty"),
        (["train", "MODEL=QWEN3-32B"], "write model=qwen3-32b"),
        (["serve", "CHECKPOINT="], "checkpoint='' is empty"),
    ],
)
def test_make_refuses_a_word_before_anything_runs(words, says):
    done = make(*words, "dry_run=true")
    assert done.returncode == 2
    assert says in done.stderr
    assert not done.stdout


def test_make_help_lists_every_target():
    done = make("help")
    targets = set(re.findall(r"^\.PHONY: ([a-z-]+)$", (REPO / "Makefile").read_text(), re.M))
    assert targets == set(re.findall(r"^  ([a-z-]+) ", done.stdout, re.M))


def test_the_entry_point_is_executable():
    assert os.access(REPO / "launch" / "limi.py", os.X_OK)
    assert shlex.split((REPO / "launch" / "limi.py").read_text().splitlines()[0]) == ["#!/usr/bin/env", "python3"]


def test_a_plan_is_printed_and_written(tmp_path):
    done = called("plan", "model=qwen3-4b", f"cluster.root={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "qwen3-4b (4.0B parameters) on 8 x h100, engine slime: fits" in done.stdout
    folder = tmp_path / "plans" / "qwen3-4b"
    assert json.loads((folder / "plan.json").read_text())["steps"]["count"] == 20
    assert (folder / "plan.html").read_text().endswith("</html>\n")


def test_a_plan_of_what_cannot_fit_exits_with_2_and_says_what_would(tmp_path):
    done = called("plan", "model=qwen3-32b", "cluster=h100x1", f"cluster.root={tmp_path}")
    assert done.returncode == 2
    assert "qwen3-32b with sequences of 152,000 tokens does not fit 1 x h100" in done.stderr
    assert "cluster.nodes=" in done.stderr or "data.max_tokens" in done.stderr


def test_a_model_that_is_not_here_is_refused_with_what_fetches_it(tmp_path):
    words = [
        "model=qwen3-tiny",
        "model.checkpoint=Qwen/Qwen3-0.6B",
        "model.random_init=false",
        f"cluster.root={tmp_path}",
    ]
    done = called("train", *words)
    assert done.returncode == 2
    assert (
        "ConfigError: model.checkpoint=Qwen/Qwen3-0.6B is not on this machine; run `make fetch MODEL=qwen3-tiny "
        "model.checkpoint=Qwen/Qwen3-0.6B model.random_init=false cluster.root="
    ) in done.stderr
    assert not list(tmp_path.iterdir())
