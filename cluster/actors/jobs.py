"""Submit, follow and stop runs as Ray jobs.

The working directory is uploaded with the job; dependencies are in the image. The job must write
its output elsewhere, to storage that all nodes share: the copy of the working directory is deleted
when the job ends.
"""

import asyncio
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
import yaml
from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
from ray._private.runtime_env import packaging
from ray.exceptions import RpcError
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.runtime_env import RuntimeEnv

from cluster.actors.reach import check_cluster, check_job_server
from orchard.errors import ActorError, ConfigError
from orchard.settings import Config

RUN_KEY, COMMAND_KEY = "orchard_run", "orchard_command"
"""Metadata keys of a job: the name of its run, and its command."""
MIB = 1 << 20
LARGEST_UPLOAD = DASHBOARD_CLIENT_MAX_SIZE
"""Bytes from which on Ray's job server refuses an uploaded folder."""
START_S = 60.0
"""Longest wait in seconds until a newly started cluster accepts a job."""
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Environment variables that name a job server or a cluster, the first one first."""
GRACE_KEY = "RAY_JOB_STOP_WAIT_TIME_S"
"""Environment variable of the seconds that Ray lets a stopped job run; its default is three."""


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """Options of a submission besides the run itself."""

    command: str = "train"
    """Command to run: `sft` or `train`."""
    working_dir: Path = Path()
    """Folder to upload, which contains the run file."""
    runtime_env: Mapping[str, Any] = field(default_factory=dict)
    """Ray runtime environment; the working directory and the grace period are added to it."""
    grace_s: float = 120.0
    """Seconds between SIGTERM and SIGKILL; enough for one step and one checkpoint."""
    cpus: float | None = None
    """CPUs reserved for the driver."""
    gpus: float | None = None
    """GPUs reserved for the driver."""
    memory: int | None = None
    """Bytes of memory reserved for the driver."""


def request(
    settings: Config, run: Path, overrides: Sequence[str], options: JobRequest
) -> dict[str, Any]:
    """Build the arguments of Ray's `submit_job`.

    Raises:
        ConfigError: the job would fail, or lose its output, on the cluster.
    """
    if options.command not in ("sft", "train"):
        raise ConfigError(f"--command = {options.command!r}; choose sft or train")
    folder = options.working_dir.resolve()
    if not run.resolve().is_relative_to(folder):
        raise ConfigError(
            f"run file {run} is outside the working directory {folder}, and the cluster gets "
            "only that folder; copy it there, or set --working-dir"
        )
    for key, path in (("output", settings.output), ("data.path", settings.data.path)):
        if not path.is_absolute():
            raise ConfigError(
                f"{key} = {path} is relative: on the cluster that is the job's own copy of the "
                f"working directory; give a folder on storage that all nodes see, {key}=/..."
            )
    environment = dict(options.runtime_env)
    variables = dict(environment.get("env_vars", {}))
    variables.setdefault(GRACE_KEY, f"{options.grace_s:.0f}")
    environment |= {"working_dir": str(folder), "env_vars": variables}
    try:
        RuntimeEnv(**environment)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the runtime environment is refused by Ray: {error}") from error
    command_line = ["python", "-m", "cluster.cli", options.command]
    command_line += [str(run.resolve().relative_to(folder)), *overrides]
    return {
        "entrypoint": shlex.join(command_line),
        "submission_id": f"{settings.name}-{options.command}-{time.strftime('%Y%m%d-%H%M%S')}",
        "runtime_env": environment,
        "metadata": {RUN_KEY: settings.name, COMMAND_KEY: options.command},
        "entrypoint_num_cpus": options.cpus,
        "entrypoint_num_gpus": options.gpus,
        "entrypoint_memory": options.memory,
    }


def check_size(environment: Mapping[str, Any]) -> None:
    """Raise ConfigError if a folder of a runtime environment is larger than Ray takes.

    Ray packs each folder without compression, leaves out what `.gitignore`, `.rayignore` and the
    environment's `excludes` name, and sends it in one request.
    """
    respect_gitignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    excludes: list[str] = list(environment.get("excludes", ()))
    for name in (environment.get("working_dir"), *environment.get("py_modules", ())):
        folder = Path(str(name)).absolute()
        if not folder.is_dir():  # a file or a URI, which is fetched by the cluster itself
            continue
        sizes: dict[str, int] = {}

        def count(path: Path, folder: Path = folder, sizes: dict[str, int] = sizes) -> None:
            if path.is_file():
                sizes[str(path.relative_to(folder))] = path.stat().st_size

        ignored = [packaging._get_excludes(folder, excludes)]  # pyright: ignore[reportPrivateUsage]
        packaging._dir_travel(  # pyright: ignore[reportPrivateUsage]
            folder, ignored, count, include_gitignore=respect_gitignore
        )
        if (total := sum(sizes.values())) >= LARGEST_UPLOAD:
            largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:3]
            shown = ", ".join(f"{file} ({sizes[file] / MIB:.1f} MiB)" for file in largest)
            raise ConfigError(
                f"{folder} would upload {total / MIB:.1f} MiB, and a cluster takes less than "
                f"{LARGEST_UPLOAD / MIB:.0f}; the largest files are {shown}: name what the run "
                "does not need in .gitignore or .rayignore, or put the code on shared storage and "
                "set working_dir of --runtime-env to file:///.../code.zip"
            )


def read_runtime_env(path: Path | None) -> dict[str, Any]:
    """Load a runtime environment from a YAML file; empty without a path."""
    if path is None:
        return {}
    if not path.is_file():
        raise ConfigError(f"--runtime-env {path} does not exist; give a YAML file")
    try:
        environment = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"--runtime-env {path} is no YAML: {error}") from error
    if not isinstance(environment, dict):
        raise ConfigError(f"--runtime-env {path} holds no mapping; see docs/operations.md")
    return environment


def client(address: str | None) -> JobSubmissionClient:
    """Connect to a job server; the default is at RAY_API_SERVER_ADDRESS or RAY_ADDRESS."""
    named = address or next(filter(None, map(os.environ.get, ADDRESS_VARIABLES)), None)
    if named is not None and "://" in named and not named.startswith("ray://"):
        check_job_server(named)
    elif named is not None:
        check_cluster(named)
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError, RpcError) as error:
        raise ConfigError(
            f"no Ray job server answers at {named or 'RAY_API_SERVER_ADDRESS'}: "
            f"{' '.join(str(error).split())[:200]}; give --address http://HEAD:8265"
        ) from error


def submit(jobs: JobSubmissionClient, arguments: dict[str, Any]) -> str:
    """Submit a request, and return its job id.

    Raises:
        ConfigError: a job already works on the run; two jobs would share one run folder.
    """
    run = arguments["metadata"][RUN_KEY]
    for job in jobs.list_jobs():
        active = not JobStatus(job.status).is_terminal()
        if active and (job.metadata or {}).get(RUN_KEY) == run:
            raise ConfigError(
                f"run {run} is already in progress as job {job.submission_id}; stop it first with "
                f"`orchard job stop {job.submission_id}`, or choose another name"
            )
    return _retry_until_agent(lambda: jobs.submit_job(**arguments))


def _retry_until_agent(send: Callable[[], str]) -> str:
    """Retry until the cluster has an agent: its job server starts before it can run a job."""
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
    """Return the `JobDetails` of a job from Ray; raises ConfigError for an unknown job."""
    try:
        return jobs.get_job_info(job)
    except RuntimeError as error:
        job_ids = ", ".join(j.submission_id or "" for j in jobs.list_jobs()) or "none"
        raise ConfigError(f"there is no job {job}; the cluster knows {job_ids}") from error


def follow(jobs: JobSubmissionClient, job: str) -> None:
    """Print a job's output until it ends.

    Raises:
        ActorError: the job did not succeed.
    """

    async def show() -> None:
        async for text in jobs.tail_job_logs(job):
            typer.echo(text, nl=False)

    asyncio.run(show())
    ended(jobs, job)


def stop(jobs: JobSubmissionClient, job: str, *, timeout_s: float) -> str:
    """Stop a job, wait until it has ended, and return its status; raises ActorError on timeout."""
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
    """Raise ActorError with Ray's message unless a job succeeded."""
    details = find(jobs, job)
    if details.status != JobStatus.SUCCEEDED:
        code = "" if details.driver_exit_code is None else f", exit code {details.driver_exit_code}"
        message = " ".join((details.message or "").split())[-300:]
        raise ActorError(
            f"job {job} ended as {details.status.value}{code}: {message}; "
            "submit the run again to resume"
        )
