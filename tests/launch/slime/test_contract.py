"""What of slime and Megatron-LM is touched is in the contract, and whatever changes of it is named before a GPU is held."""

import ast
import os
from collections import defaultdict
from pathlib import Path

import pytest

from launch.cluster.image.pins import VERSIONS
from launch.slime import arguments, installed
from launch.slime.contract import EVERYWHERE, MOVED, ON_A_CPU, Kind, Touch
from recipes.paths import REPO
from tests.launch.slime.support import on_cpu, slime_at

ALL = [*EVERYWHERE, *ON_A_CPU]
# What runs inside slime's processes.
MODEL = [REPO / "launch" / "model" / name for name in ("attention.py", "layers.py", "rotary.py")]
OURS = [path for room in ("slime", "preflight") for path in (REPO / "launch" / room).rglob("*.py")] + MODEL


def code(touch: Touch) -> str:
    """Code that keeps it."""
    *owners, name = touch.name.split(".")
    if touch.kind is Kind.says:
        return f"{touch.wanted!r}\n"
    if touch.kind is Kind.calls:
        return f"{touch.name}({touch.wanted})\n"
    parameters = f"self, {touch.wanted}" if owners else touch.wanted
    line = f"{name} = 1" if touch.kind is Kind.exists else f"def {name}({parameters}): pass"
    for depth, owner in enumerate(reversed(owners), 1):
        line = f"class {owner}:\n" + "\n".join(f"    {part}" for part in line.splitlines())
        assert depth <= 2
    return line + "\n"


def checkouts(root: Path, touches: list[Touch]) -> dict[str, str]:
    files = defaultdict(str)
    for touch in touches:
        files[root / touch.root / touch.path] += code(touch)
    for name in ("slime", "megatron"):
        (root / name).mkdir(parents=True)
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return {name: str(root / name) for name in ("slime", "megatron")}


@pytest.mark.parametrize(
    "touch", sorted(set(ALL)), ids=lambda touch: f"{touch.path.rpartition('/')[2]}-{touch.name or touch.wanted}"
)
def test_whatever_is_gone_is_named_with_what_it_was_for(tmp_path, touch):
    # Classes of one name are merged in a real file; here each touch has a file of its own.
    own = touch._replace(path="one.py")
    roots = checkouts(tmp_path / "kept", [own])
    assert installed.broken(roots, [own]) == []
    roots = checkouts(tmp_path / "gone", [])
    (Path(roots[touch.root]) / "one.py").write_text("something_else = 1\n")
    (line,) = installed.broken(roots, [own])
    assert line.startswith("one.py: ") and touch.purpose in line


@pytest.mark.parametrize(
    ("kind", "name", "wanted", "other", "says"),
    [
        (Kind.takes, "f", "a, *, b", "def f(a, *, c): pass", "the function f takes (a, *, c), not (a, *, b)"),
        (Kind.takes, "f", "a", "def f(a, b=1): pass", "the function f takes (a, b), not (a)"),
        (Kind.takes, "C.f", "a", "class C:\n    def g(self, a): pass", "has no function C.f"),
        (Kind.calls, "x.f", "a, k=1", "x.f(a, k=2)", "the call of x.f hands it (a, k=2), not (a, k=1)"),
        (Kind.calls, "f", "a", "g(a)", "has no call of f"),
        (Kind.says, "", "step {}: {}", "f'at step {n}: {d}'[0]; 'step {}'", ""),
        (Kind.says, "", "step {}: {}", "f'stage {n}: {d}'", "does not say 'step {}: {}'"),
        (Kind.exists, "C.a", "", "class C:\n    def __init__(self): self.a = 1", ""),
        (Kind.exists, "C.a", "", "class C:\n    def __init__(self): self.b = 1", "has no C.a"),
        (Kind.exists, "f", "", "try:\n    from m import f\nexcept ImportError:\n    f = None", ""),
        (Kind.exists, "f", "", "if 1:\n    def f(): pass", ""),
        (Kind.exists, "f", "", "def (", "no such module"),
    ],
)
def test_what_changed_is_said(tmp_path, kind, name, wanted, other, says):
    (tmp_path / "m.py").write_text(other)
    found = installed.broken({"slime": str(tmp_path)}, [Touch("slime", "m.py", kind, name, wanted, "why")])
    assert found == ([f"m.py: {says} (why)"] if says else [])


def test_a_checkout_that_is_not_there_is_one_line(tmp_path):
    roots = {"slime": str(tmp_path / "no"), "megatron": str(tmp_path / "none")}
    assert installed.broken(roots, ALL) == [f"no folder {tmp_path / 'no'}", f"no folder {tmp_path / 'none'}"]


def test_nothing_is_imported_that_the_contract_does_not_name():
    touched = {(module(touch.path), touch.name.split(".")[0]) for touch in ALL}
    # Modules that hand on the names of another.
    touched |= {("megatron.core.pipeline_parallel", "get_forward_backward_func"), ("slime.utils", "accelerator")}
    touched |= {("slime.utils", "misc"), ("slime.utils", "reloadable_process_group")}
    touched |= {
        ("megatron.core", "parallel_state"),
        ("megatron.core.transformer.moe", "moe_utils"),
        ("slime.backends.megatron_utils.model", "logging_utils"),
    }
    touched |= {(module(MOVED[touch.path]), touch.name) for touch in ALL if touch.path in MOVED}
    missing = []
    for path in OURS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("slime", "megatron")):
                missing += [
                    f"{path.name}: {node.module}.{a.name}" for a in node.names if (node.module, a.name) not in touched
                ]
    assert not missing


def module(path: str) -> str:
    return path.removesuffix("/__init__.py").removesuffix(".py").replace("/", ".")


def test_a_module_at_its_earlier_place_is_found(tmp_path):
    for path, earlier in MOVED.items():
        (tmp_path / earlier).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / earlier).write_text("def f(a): pass\n")
        touch = Touch("slime", path, Kind.takes, "f", "a", "why")
        assert installed.broken({"slime": str(tmp_path)}, [touch]) == []
        (line,) = installed.broken({"slime": str(tmp_path)}, [touch._replace(wanted="b")])
        assert "takes (a), not (b)" in line


@pytest.mark.contract
@pytest.mark.parametrize("commit", [commit for version in VERSIONS for commit in version.commits])
def test_every_version_that_is_offered_keeps_it(tmp_path, commit):
    on_cpu()
    assert (
        installed.broken({"slime": str(slime_at(commit, tmp_path)), "megatron": os.environ["MEGATRON_ROOT"]}, ALL) == []
    )


@pytest.mark.contract
def test_the_pinned_checkouts_keep_it():
    on_cpu()
    roots = {"slime": os.environ["SLIME_ROOT"], "megatron": os.environ["MEGATRON_ROOT"]}
    assert installed.broken(roots, ALL) == []


@pytest.mark.contract
def test_slime_is_asked_for_its_flags():
    import json
    import subprocess

    on_cpu()
    program = "import json; from launch.slime import installed; print(json.dumps(installed.flags(True)))"
    done = subprocess.run(
        [os.environ["SLIME_PYTHON"], "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{REPO}:{os.environ['MEGATRON_ROOT']}:{os.environ['SLIME_ROOT']}"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {*json.loads(done.stdout.splitlines()[-1])} - {"-h", "--help"} == {*arguments._FLAGS}
