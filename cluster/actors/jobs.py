"""Runs as jobs of a Ray cluster: submitted, followed, stopped and resumed over Ray's job API.

The working directory travels with the job, dependencies are in the image. Whatever the job writes
must lie outside, on storage that all nodes see: the copy is gone when the job has ended.
"""

import asyncio
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
import yaml
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.runtime_env import RuntimeEnv

from orchard.errors import ActorError, ConfigError
from orchard.settings import Config

RUN_KEY, COMMAND_KEY = "orchard_run", "orchard_command"
"""Keys of a job's metadata."""
START_S = 60.0
"""Longest wait for a cluster that has just started to take a job."""
GRACE_KEY = "RAY_JOB_STOP_WAIT_TIME_S"
"""Ray gives a job that it stops three seconds unless the job's environment says otherwise."""


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """What is to be submitted, beside the run itself."""

    command: str = "train"
    """`sft` or `train`."""
    working_dir: Path = Path()
    runtime_env: Mapping[str, Any] = field(default_factory=dict)
    """Of the job; the working directory and the grace period are added."""
    grace_s: float = 120.0
    """Between SIGTERM and SIGKILL; long enough for one step and one checkpoint."""
    cpus: float | None = None
    gpus: float | None = None
    memory: int | None = None
    """Bytes for the driver, as the two above are its own."""


def request(
    settings: Config, run: Path, overrides: Sequence[str], order: JobRequest
) -> dict[str, Any]:
    """The arguments of Ray's `submit_job`.

    Raises:
        ConfigError: something that would be found out, or lost, only on the cluster.
    """
    if order.command not in ("sft", "train"):
        raise ConfigError(f"--command = {order.command!r}; choose sft or train")
    folder = order.working_dir.resolve()
    if not run.resolve().is_relative_to(folder):
        raise ConfigError(
            f"run file {run} is outside the working directory {folder}, which is all that the "
            "cluster gets; copy it there, or set --working-dir"
        )
    for key, path in (("output", settings.output), ("data.path", settings.data.path)):
        if not path.is_absolute():
            raise ConfigError(
                f"{key} = {path} is relative: on the cluster that is the job's own copy of the "
                f"working directory; give a folder on storage that all nodes see, {key}=/..."
            )
    environment = dict(order.runtime_env)
    variables = dict(environment.get("env_vars", {}))
    variables.setdefault(GRACE_KEY, f"{order.grace_s:.0f}")
    environment |= {"working_dir": str(folder), "env_vars": variables}
    try:
        RuntimeEnv(**environment)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the runtime environment is refused by Ray: {error}") from error
    words = ["python", "-m", "cluster.cli", order.command]
    words += [str(run.resolve().relative_to(folder)), *overrides]
    return {
        "entrypoint": shlex.join(words),
        "submission_id": f"{settings.name}-{order.command}-{time.strftime('%Y%m%d-%H%M%S')}",
        "runtime_env": environment,
        "metadata": {RUN_KEY: settings.name, COMMAND_KEY: order.command},
        "entrypoint_num_cpus": order.cpus,
        "entrypoint_num_gpus": order.gpus,
        "entrypoint_memory": order.memory,
    }


def read_runtime_env(path: Path | None) -> dict[str, Any]:
    """A runtime environment of a YAML file; empty without one."""
    if path is None:
        return {}
    if not path.is_file():
        raise ConfigError(f"--runtime-env {path} does not exist; give a YAML file")
    try:
        found = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"--runtime-env {path} is no YAML: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"--runtime-env {path} holds no mapping; see docs/operations.md")
    return found


def client(address: str | None) -> JobSubmissionClient:
    """The job server at an address, by default at RAY_API_SERVER_ADDRESS or RAY_ADDRESS."""
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"no Ray job server answers at {address or 'RAY_API_SERVER_ADDRESS'}: "
            f"{' '.join(str(error).split())[:200]}; give --address http://HEAD:8265"
        ) from error


def submit(jobs: JobSubmissionClient, asked: dict[str, Any]) -> str:
    """Send a request off, unless the run is at work already: two would share one run folder."""
    run = asked["metadata"][RUN_KEY]
    for job in jobs.list_jobs():
        at_work = not JobStatus(job.status).is_terminal()
        if at_work and (job.metadata or {}).get(RUN_KEY) == run:
            raise ConfigError(
                f"run {run} is at work already as job {job.submission_id}; stop it first with "
                f"`orchard job stop {job.submission_id}`, or choose another name"
            )
    return _once_there_is_an_agent(lambda: jobs.submit_job(**asked))


def _once_there_is_an_agent(send: Callable[[], str]) -> str:
    """A young cluster has a job server before it has anyone to run a job: then ask again."""
    deadline = time.monotonic() + START_S
    while True:
        try:
            return send()
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
            if time.monotonic() > deadline:
                raise ActorError(
                    f"the cluster has had no agent to run a job for {START_S:.0f} s; see "
                    "dashboard_agent.log in Ray's session folder on its head node"
                ) from error
            time.sleep(1)


def find(jobs: JobSubmissionClient, job: str) -> Any:
    """What the cluster knows of a job (`ray.job_submission.JobDetails`)."""
    try:
        return jobs.get_job_info(job)
    except RuntimeError as error:
        known = ", ".join(j.submission_id or "" for j in jobs.list_jobs()) or "none"
        raise ConfigError(f"there is no job {job}; the cluster knows {known}") from error


def follow(jobs: JobSubmissionClient, job: str) -> None:
    """Show a job's output until it ends.

    Raises:
        ActorError: it did not succeed.
    """

    async def show() -> None:
        async for text in jobs.tail_job_logs(job):
            typer.echo(text, nl=False)

    asyncio.run(show())
    ended(jobs, job)


def stop(jobs: JobSubmissionClient, job: str, *, timeout_s: float) -> str:
    """Ask a job to stop and wait until it has; its status then."""
    find(jobs, job)
    jobs.stop_job(job)
    deadline = time.monotonic() + timeout_s
    while not (status := JobStatus(jobs.get_job_status(job))).is_terminal():
        if time.monotonic() > deadline:
            raise ActorError(
                f"job {job} is {status} {timeout_s:.0f} s after it was asked to stop; "
                "wait longer with --timeout, or look at its logs"
            )
        time.sleep(1.0)
    return status.value


def ended(jobs: JobSubmissionClient, job: str) -> None:
    """Raise ActorError unless a job succeeded, with what Ray says of it."""
    found = find(jobs, job)
    if found.status != JobStatus.SUCCEEDED:
        code = "" if found.driver_exit_code is None else f", exit code {found.driver_exit_code}"
        said = " ".join((found.message or "").split())[-300:]
        raise ActorError(
            f"job {job} ended as {found.status.value}{code}: {said}; submit the run again to resume"
        )
