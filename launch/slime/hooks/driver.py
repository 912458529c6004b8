"""Script that runs slime: `python launch/slime/hooks/driver.py RUN_FOLDER`, started by the Python that has slime.

It connects to Ray with the environment from `job.json`, which every process gets, and runs slime's own script in this process. If
any process of the job raises one of the project's own errors, the driver writes it to the run folder.
"""

import runpy
import signal
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[3])

from launch.cluster import connection  # noqa: E402
from launch.slime import failure  # noqa: E402
from launch.slime.arguments import on_cpu  # noqa: E402
from launch.slime.hooks import cpu, nodes, stop  # noqa: E402
from launch.slime.job import own_resources  # noqa: E402
from recipes import json_file  # noqa: E402
from recipes.compose.recipe import from_yaml  # noqa: E402


def run_driver(run: Path) -> None:
    """Run the job of a run folder."""
    job, recipe = (
        json_file.read_json(run / "job.json", "rerun `make train`, which writes it"),
        from_yaml(run / "config.yaml"),
    )
    environment: dict[str, Any] = {"env_vars": job["env_vars"]}
    if on_cpu(recipe):
        environment["worker_process_setup_hook"] = "launch.slime.hooks.cpu.install"
        cpu.install()
    try:
        with connection.session(own_resources(recipe), runtime_env=environment):
            # `ray job stop` signals every process of a job, but a stop is requested by a file, and SIGINT ends this process.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            nodes.start(run, recipe)
            stop.install(run)
            sys.argv = [job["entrypoint"], *job["argv"]]
            runpy.run_path(job["entrypoint"], run_name="__main__")
    except Exception as error:
        failure.leave(run, getattr(error, "cause", error))  # Ray wraps the error of another process
        raise


if __name__ == "__main__":
    run_driver(Path(sys.argv[1]))
