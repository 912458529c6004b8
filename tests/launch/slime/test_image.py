"""Whatever a job imports can be imported in slime's image: an environment of slime's requirements, its Dockerfile's lines, and the
metadata of the SGLang that it builds on, without what wants a GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.paths import REPO
from tests.launch.slime.support import on_cpu

pytestmark = [pytest.mark.contract, pytest.mark.slow]

# Packages that need CUDA to be imported, or hundreds of megabytes to be installed, and that no job of the project imports.
ON_GPUS = re.compile(
    r"^(nvidia|cuda|flash|sgl-deep|sglang|quack|tokenspeed|tilelang|torch|triton|kernels|apache-tvm|z3|smg|fla-core|av$|modelscope|"
    r"timm|xgrammar|llvmlite|numba|pandas|scipy|soundfile|lxml)",
    re.IGNORECASE,
)
INSTALL = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]


def of_dockerfile(text: str) -> tuple[str, list[str]]:
    """Return the version of SGLang, and the packages that the Dockerfile pins."""
    sglang = re.search(r"^ARG SGLANG_IMAGE_TAG=v([\w.]+)", text, re.MULTILINE)
    assert sglang
    return sglang[1], re.findall(r'\bpip install "?(flash-linear-attention==[\w.]+)|"(numpy==[\w.]+)"', text)


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> str:
    """The Python of such an environment."""
    on_cpu()
    folder = tmp_path_factory.mktemp("image")
    slime = Path(os.environ["SLIME_ROOT"])
    sglang, pins = of_dockerfile((slime / "docker" / "Dockerfile").read_text())
    pinned = [name for pair in pins for name in pair if name]
    numpy = next(name for name in pinned if name.startswith("numpy"))
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python, report = str(folder / "venv" / "bin" / "python"), folder / "report.json"
    asked = ["--requirement", str(slime / "requirements.txt"), f"sglang=={sglang}", *(p for p in pinned if p != numpy)]
    subprocess.run([python, *INSTALL, "--dry-run", "--ignore-installed", f"--report={report}", *asked], check=True)
    resolved = [one["metadata"] for one in json.loads(report.read_text())["install"]]
    # The Dockerfile installs numpy last, whatever the others want.
    kept = [f"{m['name']}=={m['version']}" for m in resolved if not ON_GPUS.match(m["name"]) and m["name"] != "numpy"]
    torch = next(
        line for line in (REPO / "constraints-slime.txt").read_text().splitlines() if line.startswith("torch==")
    )
    subprocess.run([python, *INSTALL, "--no-deps", *kept, numpy, torch], check=True)
    return python


def test_every_module_that_a_job_can_reach_is_imported_there(image, tmp_path):
    checkouts = [str(REPO), os.environ["MEGATRON_ROOT"], os.environ["SLIME_ROOT"]]
    done = subprocess.run(
        [image, str(REPO / "tests" / "launch" / "slime" / "imports.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": ":".join(checkouts)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["failed"] == {}
    assert found["lacked"], "an image without hydra-core"
    assert found["modules"] > 150
    assert found["http"] == "httpx", "of huggingface_hub 1, though httpx2 is installed too"
