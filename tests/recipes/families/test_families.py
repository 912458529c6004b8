"""A family is one file: nothing else asks for one by name, and a new one works by its file alone."""

import ast
import json
import re
import shutil
import subprocess
import sys

import pytest

from recipes.config import Family
from recipes.families import facts, template
from recipes.paths import CONF, REPO

HERE = REPO / "recipes" / "families"
NAMES = [family.value for family in Family]


def test_the_families_are_the_files():
    assert sorted(p.stem for p in HERE.glob("*.py") if not p.stem.startswith("_")) == NAMES
    assert {"qwen3", "glm4_moe"} <= {*NAMES}


def test_nothing_else_asks_for_a_family_by_name():
    """Neither as a member, nor as a text; models, whose names contain a family's, may be named."""
    found = []
    for folder in ("recipes", "data_prep", "launch"):
        for path in (REPO / folder).rglob("*.py"):
            if path.parent == HERE:
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                member = (
                    isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Family"
                )
                if member or (isinstance(node, ast.Constant) and node.value in NAMES):
                    found.append(f"{path.relative_to(REPO)}:{node.lineno}")
    assert found == []


@pytest.mark.parametrize("family", Family, ids=NAMES)
def test_a_family_says_all_that_is_asked(family):
    said = facts(family)
    assert {*said.chat.stops, *said.chat.think} <= {*said.tiny.special}
    assert {*said.chat.roles} <= {*said.tiny.special} and {*said.tiny.eos} <= {*said.tiny.special}
    assert (CONF / "model" / f"{said.tiny.model}.yaml").is_file()
    assert "add_generation_prompt" in template(family).read_text(encoding="utf-8")


def listed():
    """The files that README.md says a new family adds."""
    section = (HERE / "README.md").read_text(encoding="utf-8").partition("## Add a family\n")[2].partition("\n## ")[0]
    return re.findall(r"^- `([^`]+)`", section, re.M)


@pytest.mark.run
def test_a_made_up_family_takes_the_files_that_the_list_names(tmp_path):
    """qwen3 under another name: its tiny model is made, its data packed and proved, its plan made."""
    checkout = tmp_path / "checkout"
    for folder in ("recipes", "data_prep", "launch", "hydra_conf"):
        shutil.copytree(REPO / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__"))
    names = listed()
    assert len(names) >= 3
    for name in names:
        old = checkout / name.replace("NAME", "qwen3")
        new = checkout / name.replace("NAME", "made_up")
        text = old.read_text(encoding="utf-8")
        # transformers knows no model of the new name: only config.json's model_type is still the old one's.
        new.write_text(
            text.replace("family: qwen3", "family: made_up").replace("qwen3-tiny", "made_up-tiny"), encoding="utf-8"
        )
    run = [sys.executable, "launch/limi.py"]
    words = ["model=made_up-tiny", f"cluster.root={tmp_path}", "cluster.gpus_per_node=1"]
    done = subprocess.run([*run, "data", *words], cwd=checkout, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    kept = sorted(json.loads(p.read_text())["counts"]["kept"] for p in tmp_path.glob("data/*/manifest.json"))
    assert kept == [4, 20]
    done = subprocess.run([*run, "plan", *words], cwd=checkout, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
