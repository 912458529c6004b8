"""A stage as a job of the Ray cluster at `cluster.address`: submitted, watched, found again and stopped."""

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

AGENT_S = 60.0  # the part of Ray that starts jobs comes up later than the one that answers
KILLED_S = 30.0  # within which Ray reports the end of a job that it killed


def entrypoint(stage: str, recipe: Recipe, script: str = "launch/limi.py") -> str:
    """The job's command line, quoted for a shell: the words as they were typed, but for the cluster's address."""
    words = [w for w in recipe.words if not w.startswith("cluster.address=")]
    return shlex.join(["python3", script, stage, *words])


def env_vars(recipe: Recipe) -> dict[str, str]:
    """Ray's own patience with a job that is to stop, 3 s, would not let a step end and be saved."""
    return {"RAY_JOB_STOP_WAIT_TIME_S": str(recipe.engine.timeout)}


def metadata(stage: str, recipe: Recipe) -> dict[str, str]:
    return {RUN: recipe.run, STAGE: stage, STOP_S: str(recipe.engine.timeout)}


def submit(stage: str, recipe: Recipe, console: Console) -> None:
    """Runs a stage as a job and watches it to its end.

    Nothing of this process's environment goes with it: keys belong in the environment of `ray start`. Raises
    `PreflightError` where a job of the run is at it, and `TrainError` where the job fails.
    """
    check_size(REPO)
    client = connect(recipe)
    for job in of_runs(client):
        if job.run == recipe.run and not job.ended:
            raise PreflightError(
                f"run={recipe.run} is {job.status} as job {job.id}",
                f"{_make('attach', recipe)} shows it, {_make('stop', recipe)} stops it, and run=OTHER is another run",
            )
    job_id = _submitted(client, stage, recipe)
    console.print(f"job {job_id} on {recipe.cluster.address}; {_make('attach', recipe)} shows it again")
    _watch(Log(client, job_id, console), recipe)


def _submitted(client: Client, stage: str, recipe: Recipe) -> str:
    """The new job's name."""
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
                raise PreflightError(f"cluster.address={recipe.cluster.address} took no job: {error}") from error
            time.sleep(1)


def attach(recipe: Recipe, console: Console) -> None:
    """Shows the run's last job from its first line, and watches it to its end."""
    client = connect(recipe)
    job = newest(client, recipe)
    console.print(f"job {job.id}, {job.status}")
    _watch(Log(client, job.id, console), recipe)


def stop(recipe: Recipe, console: Console) -> None:
    """Stops the run's last job and waits for its end; the embedded engine saves its step. Raises `TrainError` where it goes on."""
    client = connect(recipe)
    job = newest(client, recipe)
    if job.ended:
        console.print(f"job {job.id} has ended before: {job.status}")
        return
    client.stop_job(job.id)
    patience = job.stop_s + KILLED_S
    deadline = time.monotonic() + patience
    while not (status := client.get_job_status(job.id)).is_terminal():
        if time.monotonic() > deadline:
            raise TrainError(
                f"job {job.id} is {status} still, {patience:.0f} s after it was told to stop",
                f"look at it with {_make('attach', recipe)}",
            )
        time.sleep(0.5)
    console.print(f"job {job.id} has ended: {status}")


def _watch(log: Log, recipe: Recipe) -> None:
    """Shows a job to its end, its status becoming this process's. Ctrl-C asks what is meant."""
    meant = ""
    while True:
        try:
            if meant == "s":
                log.client.stop_job(log.job_id)
            if meant:
                log.console.print(f"{'stopping' if meant == 's' else 'watching'} job {log.job_id}")
            job = log.follow()
        except KeyboardInterrupt:
            meant = _meant(log.console)
            if meant == "d":
                raise KeyboardInterrupt(
                    f"Detached: job {log.job_id} goes on; {_make('attach', recipe)} shows it, {_make('stop', recipe)} stops it."
                ) from None
        else:
            return _report(job, recipe)


def _meant(console: Console) -> str:
    """d, s or g; d without a terminal, and where Ctrl-C comes again."""
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
    """Ends as the job ended."""
    if job.status is JobStatus.STOPPED:
        again = "the same command without anew=true" if recipe.anew else "the same command"
        raise KeyboardInterrupt(f"Job {job.id} was stopped; {again} goes on from its last checkpoint.")
    if job.status is JobStatus.FAILED:
        raise TrainError(f"job {job.id} of run={recipe.run}: {job.message}")


def _make(target: str, recipe: Recipe) -> str:
    return f"`make {target} run={recipe.run} cluster.address={recipe.cluster.address}`"
