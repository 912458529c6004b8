"""Run by the Python that has slime, as `python launch/slime/driver.py RUN_FOLDER`: connects to Ray with the environment that
`job.json` gives every process, and runs slime's own script in this one. An error of the project's own, from any process of the job,
is left in the run folder as it was raised."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

from launch.slime import cpu, failure  # noqa: E402
from launch.slime.arguments import on_cpu  # noqa: E402
from recipes.compose import from_yaml, in_ray_job  # noqa: E402
from recipes.layout import world_size  # noqa: E402


def main(run: Path) -> None:
    import ray

    job, recipe = json.loads((run / "job.json").read_text()), from_yaml(run / "config.yaml")
    environment: dict[str, Any] = {"env_vars": job["env_vars"]}
    if on_cpu(recipe):
        environment["worker_process_setup_hook"] = "launch.slime.cpu.install"
        cpu.install()
    if in_ray_job():
        ray.init(runtime_env=environment)
    else:
        ranks = world_size(recipe)
        here: dict[str, Any] = {"num_cpus": ranks + 4, "num_gpus": ranks} if on_cpu(recipe) else {}
        ray.init(address="local", runtime_env=environment, include_dashboard=False, **here)
    sys.argv = [job["entrypoint"], *job["argv"]]
    try:
        runpy.run_path(job["entrypoint"], run_name="__main__")
    except Exception as error:
        failure.leave(run, getattr(error, "cause", error))  # what Ray wraps around an error of another process
        raise


if __name__ == "__main__":
    main(Path(sys.argv[1]))
