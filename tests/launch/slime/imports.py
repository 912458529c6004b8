"""Import every module that a job can reach, with the Python that runs this file: `imports.py CLUSTER_ROOT`.

Print as JSON what could not be imported, and why. The packages that slime's images lack are brought first, as for a job.
"""

import importlib
import json
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(REPO))

from launch.cluster.image import packages  # noqa: E402

# The embedded engine, which trains where `make` set up the environment; programs, not modules; stand-ins for a CPU's SGLang.
NOT_OF_A_JOB = (
    "launch.megatron",
    "launch.bench",
    "launch.model",
    "launch.serving.stand_ins",
    "launch.slime.hooks.driver",
)


def modules() -> list[str]:
    paths = [path for room in ("recipes", "data_prep", "launch") for path in (REPO / room).rglob("*.py")]
    names = [".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return sorted(name for name in names if not name.startswith(NOT_OF_A_JOB))


if __name__ == "__main__":
    lacked = packages.lacks()
    if lacked:
        packages.bring(sys.argv[1])
    failed = {}
    for name in modules():
        try:
            importlib.import_module(name)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
    from data_prep.hub_errors import http

    print(json.dumps({"lacked": lacked, "modules": len(modules()), "failed": failed, "http": http().__name__}))
