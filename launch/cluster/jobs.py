"""Access to jobs through a Ray cluster's dashboard: the connection, the jobs of a run, and a job's live log."""

import asyncio
import contextlib
import logging
import os
import time
from dataclasses import dataclass
from typing import Any

import aiohttp
import requests
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from rich.console import Console

from recipes.config import Recipe
from recipes.errors import ConfigError, PreflightError, TrainError

RUN, STAGE, STOP_S = "limi_run", "limi_stage", "limi_stop_s"  # keys of a job's metadata
ANSWER_S = 10.0  # longest wait for an answer of the cluster
UPLOAD_S = 120.0  # longest wait when the cluster must first store a package or find a node for a job
QUIET_S = 10.0  # if a job writes nothing for this long, its status is queried
GONE_S = 60.0  # how long a watched cluster may stay unreachable


class Client(JobSubmissionClient):
    """Ray's job client with bounded waits. It sends a token only if the cluster asks for one.

    The same command therefore works on clusters with and without tokens.
    """

    def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> requests.Response:
        wait = ANSWER_S if method == "GET" else UPLOAD_S
        try:
            return super()._do_request(method, endpoint, timeout=(ANSWER_S, wait), **kwargs)
        except requests.RequestException as error:
            raise PreflightError(
                f"cluster.address={self._address} does not answer ({type(error).__name__})",
                "check that Ray runs there (`ray status`), that it was started with --dashboard-host=0.0.0.0, and that this "
                "machine can reach that port; or write cluster.address=http://HEAD:8265",
            ) from error
        except AuthenticationError as error:
            token = AuthenticationTokenLoader.instance().get_token_for_http_header(ignore_auth_mode=True)
            if not token or token.items() <= self._headers.items():
                raise PreflightError(
                    f"cluster.address={self._address} asks for a token, "
                    + ("and rejects the one of this machine" if token else "but this machine has none"),
                    "copy ~/.ray/auth_token from the machine that started Ray, or set RAY_AUTH_TOKEN_PATH to a file with it",
                ) from error
            self._headers.update(token)
            return self._do_request(method, endpoint, **kwargs)


def connect(recipe: Recipe) -> Client:
    """Return a client of the cluster at `cluster.address`.

    Raise `ConfigError` if the address is not set, and `PreflightError` if no cluster answers within `ANSWER_S`.
    """
    address = recipe.cluster.address
    if address is None:
        raise ConfigError(
            "cluster.address is not set, but jobs run on a cluster", "write cluster.address=http://HEAD:8265"
        )
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # for Ray these override the recipe's address
        os.environ.pop(name, None)
    logging.disable(logging.WARNING)  # Ray logs every file that it reads, and its modules set their own levels
    try:
        return Client(address)
    except (RuntimeError, KeyError, ValueError, requests.RequestException) as error:  # another kind of server
        raise PreflightError(
            f"cluster.address={address} answers, but it is not Ray's dashboard",
            "write cluster.address=http://HEAD:8265",
        ) from error


@dataclass(frozen=True)
class Job:
    """A snapshot of one job's state on the cluster."""

    id: str
    run: str
    status: JobStatus
    message: str  # a failed job's last lines
    started: int  # start time in ms since the epoch
    stop_s: float  # seconds that Ray waits for the job to stop before killing it

    @staticmethod
    def of(details: JobDetails) -> "Job":
        metadata = details.metadata or {}
        started, message = details.start_time or 0, details.message or ""
        return Job(str(details.submission_id), metadata[RUN], details.status, message, started, float(metadata[STOP_S]))

    @property
    def ended(self) -> bool:
        return self.status.is_terminal()


def of_runs(client: Client) -> list[Job]:
    """Return the cluster's jobs that belong to runs, newest first."""
    jobs = [Job.of(d) for d in client.list_jobs() if d.submission_id and RUN in (d.metadata or {})]
    return sorted(jobs, key=lambda job: job.started, reverse=True)


def newest(client: Client, recipe: Recipe) -> Job:
    """Return the run's latest job. Raise `ConfigError` with the existing runs if it has none."""
    jobs = of_runs(client)
    for job in jobs:
        if job.run == recipe.run:
            return job
    runs = ", ".join(dict.fromkeys(job.run for job in jobs))
    raise ConfigError(
        f"run={recipe.run} has no job on {recipe.cluster.address}; "
        + (f"write run=NAME with one of {runs}" if runs else "no run has one: `make train` submits one")
    )


class Log:
    """Prints a job's output, each character once. A broken stream restarts at the job's first line; printed text is skipped."""

    def __init__(self, client: Client, job_id: str, console: Console) -> None:
        self.client, self.job_id, self.console = client, job_id, console
        self.shown = 0  # characters

    def follow(self) -> Job:
        """Print new output until the job has ended. Raise `TrainError` if the cluster is unreachable for `GONE_S`."""
        while True:
            with contextlib.suppress(RuntimeError, aiohttp.ClientError, OSError):
                asyncio.run(self._stream())
            job = self._job()
            if job.ended:
                break
            time.sleep(1)
        with contextlib.suppress(RuntimeError, PreflightError):  # its node may be gone
            self._show(self.client.get_job_logs(self.job_id)[self.shown :])
        return job

    async def _stream(self) -> None:
        """Print new output until the stream ends, or is silent while the job has ended or the cluster does not answer."""
        to_skip = self.shown
        stream = self.client.tail_job_logs(self.job_id)
        while True:
            next_text = asyncio.ensure_future(anext(stream))
            while not (await asyncio.wait({next_text}, timeout=QUIET_S))[0]:
                try:
                    if (await asyncio.to_thread(self.client.get_job_info, self.job_id)).status.is_terminal():
                        return
                except PreflightError:
                    return
            try:
                text = next_text.result()
            except StopAsyncIteration:
                return
            self._show(text[to_skip:])
            to_skip = max(0, to_skip - len(text))

    def _show(self, text: str) -> None:
        self.console.file.write(text)
        self.console.file.flush()
        self.shown += len(text)

    def _job(self) -> Job:
        """Return the job's current state. Retry for `GONE_S` if the cluster does not answer, then raise `TrainError`."""
        deadline = time.monotonic() + GONE_S
        while True:
            try:
                return Job.of(self.client.get_job_info(self.job_id))
            except (PreflightError, RuntimeError) as error:
                if time.monotonic() > deadline:
                    raise TrainError(
                        f"the cluster has not reported job {self.job_id} for {GONE_S:.0f} s ({error})",
                        "when the cluster is back, `make attach` shows the job, and `make train` resumes from the last checkpoint",
                    ) from error
                time.sleep(1)
