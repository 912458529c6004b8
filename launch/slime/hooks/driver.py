"""Run by the Python that has slime, as `python launch/slime/hooks/driver.py RUN_FOLDER`: connects to Ray with the environment that
`job.json` gives every process, and runs slime's own script in this one. An error of the project's own, from any process of the job,
is left in the run folder as it was raised."""

import runpy
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[3])

from launch.cluster import connection  # noqa: E402
from launch.slime import failure  # noqa: E402
from launch.slime.arguments import on_cpu  # noqa: E402
from launch.slime.hooks import cpu  # noqa: E402
from launch.slime.job import own_resources  # noqa: E402
from recipes import json_file  # noqa: E402
from recipes.compose.recipe import from_yaml  # noqa: E402


def main(run: Path) -> None:
    job, recipe = (
        json_file.read(run / "job.json", "run `make train` again, which writes it"),
        from_yaml(run / "config.yaml"),
    )
    environment: dict[str, Any] = {"env_vars": job["env_vars"]}
    if on_cpu(recipe):
        environment["worker_process_setup_hook"] = "launch.slime.hooks.cpu.install"
        cpu.install()
    try:
        with connection.session(own_resources(recipe), runtime_env=environment):
            sys.argv = [job["entrypoint"], *job["argv"]]
            runpy.run_path(job["entrypoint"], run_name="__main__")
    except Exception as error:
        failure.leave(run, getattr(error, "cause", error))  # what Ray wraps around an error of another process
        raise


if __name__ == "__main__":
    main(Path(sys.argv[1]))
