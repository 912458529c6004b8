"""Stages as jobs of the Ray cluster at `cluster.address`: submit, watch, attach and stop."""

import shlex
import sys
import time

from ray.job_submission import JobStatus
from rich.console import Console

from launch.cluster.jobs import RUN, STAGE, STOP_S, Client, Job, Log, connect, newest, of_runs
from launch.cluster.upload import check_size
from recipes.config import Recipe
from recipes.errors import PreflightError, TrainError
from recipes.paths import REPO

AGENT_S = 60.0  # longest wait for Ray's job agent, which comes up later than the dashboard
KILLED_S = 30.0  # Ray reports the end of a job within this time after killing it


def entrypoint(stage: str, recipe: Recipe, script: str = "launch/limi.py") -> str:
    """Return the job's command line, quoted for a shell: the overrides as typed, without the cluster's address."""
    words = [w for w in recipe.overrides if not w.startswith("cluster.address=")]
    return shlex.join(["python3", script, stage, *words])


def env_vars(recipe: Recipe) -> dict[str, str]:
    """Return the job's environment. Ray's default of 3 s to stop a job is too short to finish and save a step."""
    return {"RAY_JOB_STOP_WAIT_TIME_S": str(recipe.engine.timeout)}


def metadata(stage: str, recipe: Recipe) -> dict[str, str]:
    return {RUN: recipe.run, STAGE: stage, STOP_S: str(recipe.engine.timeout)}


def submit(stage: str, recipe: Recipe, console: Console) -> None:
    """Run a stage as a job and watch it to its end.

    The job gets nothing from this process's environment: keys belong in the environment of `ray start`.
    Raise `PreflightError` if a job of the run is still active, and `TrainError` if the job fails.
    """
    check_size(REPO)
    client = connect(recipe)
    for job in of_runs(client):
        if job.run == recipe.run and not job.ended:
            raise PreflightError(
                f"run={recipe.run} is {job.status} as job {job.id}",
                f"{_make('attach', recipe)} shows it, {_make('stop', recipe)} stops it, and run=OTHER starts another run",
            )
    job_id = _submitted(client, stage, recipe)
    console.print(f"job {job_id} on {recipe.cluster.address}; {_make('attach', recipe)} shows it again")
    _watch(Log(client, job_id, console), recipe)


def _submitted(client: Client, stage: str, recipe: Recipe) -> str:
    """Submit the job and return its id. Raise `PreflightError` if the cluster does not accept it."""
    deadline = time.monotonic() + AGENT_S
    while True:
        try:
            return client.submit_job(
                entrypoint=entrypoint(stage, recipe),
                runtime_env={"working_dir": str(REPO), "env_vars": env_vars(recipe)},
                metadata=metadata(stage, recipe),
                submission_id=f"{recipe.run}-{time.strftime('%Y%m%d-%H%M%S')}",
            )
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise PreflightError(
                    f"cluster.address={recipe.cluster.address} did not accept the job: {error}"
                ) from error
            time.sleep(1)


def attach(recipe: Recipe, console: Console) -> None:
    """Print the output of the run's latest job from its first line, and watch the job to its end."""
    client = connect(recipe)
    job = newest(client, recipe)
    console.print(f"job {job.id}, {job.status}")
    _watch(Log(client, job.id, console), recipe)


def stop(recipe: Recipe, console: Console) -> None:
    """Stop the run's latest job and wait for its end. The embedded engine saves its step first.

    Raise `TrainError` if the job does not end in time.
    """
    client = connect(recipe)
    job = newest(client, recipe)
    if job.ended:
        console.print(f"job {job.id} had already ended: {job.status}")
        return
    client.stop_job(job.id)
    patience = job.stop_s + KILLED_S
    deadline = time.monotonic() + patience
    while not (status := client.get_job_status(job.id)).is_terminal():
        if time.monotonic() > deadline:
            raise TrainError(
                f"job {job.id} is still {status} {patience:.0f} s after it was told to stop",
                f"watch it with {_make('attach', recipe)}",
            )
        time.sleep(0.5)
    console.print(f"job {job.id} has ended: {status}")


def _watch(log: Log, recipe: Recipe) -> None:
    """Print a job's output to its end, and end as the job ended. On Ctrl-C ask whether to detach, stop or go on."""
    choice = ""
    while True:
        try:
            if choice == "s":
                log.client.stop_job(log.job_id)
            if choice:
                log.console.print(f"{'stopping' if choice == 's' else 'watching'} job {log.job_id}")
            job = log.follow()
        except KeyboardInterrupt:
            choice = _ask_choice(log.console)
            if choice == "d":
                raise KeyboardInterrupt(
                    f"Detached: job {log.job_id} goes on; {_make('attach', recipe)} shows it, {_make('stop', recipe)} stops it."
                ) from None
        else:
            return _report(job, recipe)


def _ask_choice(console: Console) -> str:
    """Return the user's choice: d, s or g. Return d if there is no terminal, or on a second Ctrl-C."""
    if not (console.is_terminal and sys.stdin.isatty()):
        return "d"
    answer = ""
    while answer not in ("d", "s", "g"):
        try:
            answer = console.input("\n[d]etach (the job goes on), [s]top it, or [g]o on watching? ", markup=False)
        except (KeyboardInterrupt, EOFError):
            return "d"
        answer = answer.strip().lower()[:1]
    return answer


def _report(job: Job, recipe: Recipe) -> None:
    """Raise `KeyboardInterrupt` if the job was stopped, and `TrainError` if it failed."""
    if job.status is JobStatus.STOPPED:
        again = "the same command without anew=true" if recipe.anew else "the same command"
        raise KeyboardInterrupt(f"Job {job.id} was stopped; {again} resumes from its last checkpoint.")
    if job.status is JobStatus.FAILED:
        raise TrainError(f"job {job.id} of run={recipe.run}: {job.message}")


def _make(target: str, recipe: Recipe) -> str:
    return f"`make {target} run={recipe.run} cluster.address={recipe.cluster.address}`"
