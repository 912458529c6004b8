"""Jobs of a Ray cluster, over its dashboard: the connection, the jobs of a run, and what a job writes as it comes."""

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

RUN, STAGE, STOP_S = "limi_run", "limi_stage", "limi_stop_s"  # what a job's metadata says of it
ANSWER_S = 10.0  # longest wait for a cluster's answer
UPLOAD_S = 120.0  # the same where a cluster first stores a package or looks for a place to start a job
QUIET_S = 10.0  # after which a silent job is asked whether it still runs
GONE_S = 60.0  # a watched cluster may be silent so long


class Client(JobSubmissionClient):
    """Ray's client with bounded waits, and with the token only where the cluster asks for one: a plain command works with
    clusters that have tokens and with those that have none."""

    def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> requests.Response:
        wait = ANSWER_S if method == "GET" else UPLOAD_S
        try:
            return super()._do_request(method, endpoint, timeout=(ANSWER_S, wait), **kwargs)
        except requests.RequestException as error:
            raise PreflightError(
                f"cluster.address={self._address} does not answer ({type(error).__name__})",
                "look whether Ray runs there (`ray "
                "status`), was started with --dashboard-host=0.0.0.0, and whether this machine reaches that port, or write "
                "cluster.address=http://HEAD:8265",
            ) from error
        except AuthenticationError as error:
            token = AuthenticationTokenLoader.instance().get_token_for_http_header(ignore_auth_mode=True)
            if not token or token.items() <= self._headers.items():
                raise PreflightError(
                    f"cluster.address={self._address} wants a token, and {'refuses this one' if token else 'there is none here'}"
                    "",
                    "copy ~/.ray/auth_token of the machine that started Ray, or set RAY_AUTH_TOKEN_PATH to a file with it",
                ) from error
            self._headers.update(token)
            return self._do_request(method, endpoint, **kwargs)


def connect(recipe: Recipe) -> Client:
    """The cluster at `cluster.address`. Raises `PreflightError` where none answers within `ANSWER_S`."""
    address = recipe.cluster.address
    if address is None:
        raise ConfigError(
            "cluster.address is not set, and jobs are on a cluster", "write cluster.address=http://HEAD:8265"
        )
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # Ray would go there whatever the recipe says
        os.environ.pop(name, None)
    logging.disable(logging.WARNING)  # Ray tells of every file it reads, and its modules set their own levels
    try:
        return Client(address)
    except (RuntimeError, KeyError, ValueError, requests.RequestException) as error:  # another server's pages
        raise PreflightError(
            f"cluster.address={address} answers, and not as Ray's dashboard does",
            "write cluster.address=http://HEAD:8265",
        ) from error


@dataclass(frozen=True)
class Job:
    """A job as the cluster had it when asked."""

    id: str
    run: str
    status: JobStatus
    message: str  # of a failed one: its last lines
    started: int  # ms
    stop_s: float  # Ray's patience with it when it is to stop

    @staticmethod
    def of(details: JobDetails) -> "Job":
        said = details.metadata or {}
        started, message = details.start_time or 0, details.message or ""
        return Job(str(details.submission_id), said[RUN], details.status, message, started, float(said[STOP_S]))

    @property
    def ended(self) -> bool:
        return self.status.is_terminal()


def of_runs(client: Client) -> list[Job]:
    """The cluster's jobs that are runs, the newest first."""
    found = [Job.of(d) for d in client.list_jobs() if d.submission_id and RUN in (d.metadata or {})]
    return sorted(found, key=lambda job: job.started, reverse=True)


def newest(client: Client, recipe: Recipe) -> Job:
    """The run's last job. Raises `ConfigError` with the runs that are there."""
    jobs = of_runs(client)
    for job in jobs:
        if job.run == recipe.run:
            return job
    there = ", ".join(dict.fromkeys(job.run for job in jobs))
    raise ConfigError(
        f"run={recipe.run} has no job on {recipe.cluster.address}; "
        + (f"write run=NAME, one of {there}" if there else "no run has: `make train` submits one")
    )


class Log:
    """What a job writes, shown once. A stream that broke begins again at the job's first line: what was shown is passed over."""

    def __init__(self, client: Client, job_id: str, console: Console) -> None:
        self.client, self.job_id, self.console = client, job_id, console
        self.shown = 0  # characters

    def follow(self) -> Job:
        """Shows what comes until the job has ended. Raises `TrainError` where the cluster is gone for `GONE_S`."""
        while True:
            with contextlib.suppress(RuntimeError, aiohttp.ClientError, OSError):
                asyncio.run(self._stream())
            job = self._asked()
            if job.ended:
                break
            time.sleep(1)
        with contextlib.suppress(RuntimeError, PreflightError):  # its node may be gone
            self._show(self.client.get_job_logs(self.job_id)[self.shown :])
        return job

    async def _stream(self) -> None:
        """Shows what comes until the stream ends, or falls silent with its job ended or its cluster not answering."""
        behind = self.shown
        stream = self.client.tail_job_logs(self.job_id)
        while True:
            coming = asyncio.ensure_future(anext(stream))
            while not (await asyncio.wait({coming}, timeout=QUIET_S))[0]:
                try:
                    if (await asyncio.to_thread(self.client.get_job_info, self.job_id)).status.is_terminal():
                        return
                except PreflightError:
                    return
            try:
                text = coming.result()
            except StopAsyncIteration:
                return
            self._show(text[behind:])
            behind = max(0, behind - len(text))

    def _show(self, text: str) -> None:
        self.console.file.write(text)
        self.console.file.flush()
        self.shown += len(text)

    def _asked(self) -> Job:
        """The job as the cluster has it now; a cluster that does not answer is asked again for `GONE_S`."""
        deadline = time.monotonic() + GONE_S
        while True:
            try:
                return Job.of(self.client.get_job_info(self.job_id))
            except (PreflightError, RuntimeError) as error:
                if time.monotonic() > deadline:
                    raise TrainError(
                        f"the cluster has not told of job {self.job_id} for {GONE_S:.0f} s ({error})",
                        "where the cluster is "
                        "back, `make attach` shows it again, and `make train` goes on from the last checkpoint",
                    ) from error
                time.sleep(1)
