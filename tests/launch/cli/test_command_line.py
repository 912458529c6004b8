"""Which stage and which overrides a command's words are, and what is said of a word that is neither."""

import re

import pytest

from launch.cli.command_line import _ELSEWHERE, parted
from launch.cli.stages import STAGES
from recipes.errors import ConfigError
from tests.conftest import REPO

KNOWN = f"the stages are {', '.join(STAGES)}; `make help` says what each does"


@pytest.mark.parametrize(
    ("words", "stage", "overrides"),
    [
        ([], "train", []),
        (["optim.lr=1"], "train", ["optim.lr=1"]),
        (["a=1", "plan", "b="], "plan", ["a=1", "b="]),
        (["bench-gpu"], "bench-gpu", []),
        (["plan", "plan"], "plan", []),
        (["data.path=/a =b"], "train", ["data.path=/a =b"]),
        (["optim.lr=", "plan"], "plan", ["optim.lr="]),
    ],
)
def test_a_command_is_a_stage_and_overrides(words, stage, overrides):
    assert parted(words) == (stage, overrides)


@pytest.mark.parametrize(
    ("words", "problem", "fix"),
    [
        ("trian", "'trian' is no stage and not name=value", f"the nearest is train: {KNOWN}"),
        ("TRAIN", "'TRAIN' is no stage and not name=value", f"the nearest is train: {KNOWN}"),
        ("bench_gpu", "'bench_gpu' is no stage and not name=value", f"the nearest is bench-gpu: {KNOWN}"),
        *(
            (word, f"'{word}' is no stage and not name=value", f"here it is {stage}: {KNOWN}")
            for word, stage in {
                "eval": "sanity", "finetune": "train", "sft": "train", "serve-model": "serve", "preprocess": "data",
                "tokenize": "data", "Download": "fetch",
            }.items()
        ),
        ("test", "'test' is no stage and not name=value", KNOWN),
        ("plan foo", "'foo' is no stage and not name=value", KNOWN),
        ("--help", "'--help' is no stage and not name=value", KNOWN),
        ("-h", "'-h' is no stage and not name=value", KNOWN),
        ("1e-5", "'1e-5' is no stage and not name=value", KNOWN),
        (
            "plan train run=a",
            "plan and train are 2 stages, and a command is one",
            "run `make plan` and then `make train`, each with its overrides",
        ),
        ("train --learning-rate 1e-5", "'--learning-rate 1e-5' is not name=value", "here it is 'optim.lr': write optim.lr=1e-5"),
        ("—lr 1e-5 run=a", "'—lr 1e-5' is not name=value", "here it is 'optim.lr': write optim.lr=1e-5"),
        ("--lr", "'--lr' is not name=value", "here it is 'optim.lr': write optim.lr=X, a number"),
        ("--lr run=a", "'--lr' is not name=value", "here it is 'optim.lr': write optim.lr=X, a number"),
        ("--bf16 --lr 1e-5", "'--bf16' is not name=value", "here it is 'engine.dtype': write engine.dtype=bf16"),
        ("--sequence-parallel", "'--sequence-parallel' is not name=value", "here it is 'layout.sp': write layout.sp=true"),
        ("--output-dir", "'--output-dir' is not name=value",
         "here it is 'cluster.root' (a run is in the folder runs/NAME of it, and run=NAME names the run): write cluster.root=TEXT"),
        ("--dry-run plan", "'--dry-run' is not name=value", "the nearest is 'dry_run': write dry_run=true"),
        ("--model Qwen/Qwen3-32B", "'--model Qwen/Qwen3-32B' is not name=value", "write model=qwen3-32b"),
        ("optim.lr 1e-5", "'optim.lr 1e-5' is not name=value", "write optim.lr=1e-5"),
        ("seed", "'seed' is not name=value", "write seed=N, a whole number"),
        ("model", "'model' is not name=value", "write model=NAME"),
        ("optim.lr:1e-5", "'optim.lr:1e-5' is not name=value", "write optim.lr=1e-5"),
        ("optim.lr = 1e-5 run=a", "'optim.lr = 1e-5' has a space beside its '='", "write optim.lr=1e-5"),
        ("optim.lr= 1e-5", "'optim.lr= 1e-5' has a space beside its '='", "write optim.lr=1e-5"),
        ("optim.lr =1e-5", "'optim.lr =1e-5' has a space beside its '='", "write optim.lr=1e-5"),
    ],
)  # fmt: skip
def test_any_other_word_is_refused(words, problem, fix):
    with pytest.raises(ConfigError) as error:
        parted(words.split(" "))
    assert (error.value.problem, error.value.fix) == (problem, fix)


def test_a_secret_is_not_repeated():
    with pytest.raises(ConfigError) as error:
        parted(["--wandb-api-key", "abc123"])
    assert "'--wandb-api-key' is not" in str(error.value) and "abc123" not in str(error.value)


def test_what_others_call_a_stage_is_none_of_ours():
    assert not {name.replace("_", "-") for name in _ELSEWHERE} & {*STAGES}
    assert {*_ELSEWHERE.values()} <= {*STAGES}


def test_every_stage_is_a_target_of_make():
    """make asks the entry point about words that are no target: one that is a stage would run."""
    assert {*STAGES} <= {*re.findall(r"^\.PHONY: (\S+)$", (REPO / "Makefile").read_text(), re.M)}
