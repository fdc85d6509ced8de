"""Commands for runs as jobs of a Ray cluster: `orchard submit`, `orchard job ...`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.options import DryRun, Overrides, RunFile
from orchard import config

job = typer.Typer(help="Look after submitted runs.", no_args_is_help=True)

Address = Annotated[
    str | None, typer.Option(help="Job server; by default RAY_API_SERVER_ADDRESS or RAY_ADDRESS.")
]
JobId = Annotated[str, typer.Argument(help="As `orchard submit` said it.")]


def submit(
    run: RunFile,
    overrides: Overrides = None,
    command: Annotated[str, typer.Option(help="sft or train.")] = "train",
    address: Address = None,
    working_dir: Annotated[Path, typer.Option(help="The code that travels along.")] = Path(),
    runtime_env: Annotated[
        Path | None, typer.Option(help="YAML file with Ray's runtime environment.")
    ] = None,
    grace: Annotated[float, typer.Option(min=1, help="Seconds to save in when stopped.")] = 120.0,
    cpus: Annotated[float | None, typer.Option(help="CPUs of the driver.")] = None,
    gpus: Annotated[float | None, typer.Option(help="GPUs of the driver.")] = None,
    memory: Annotated[int | None, typer.Option(help="Bytes for the driver.")] = None,
    wait: Annotated[bool, typer.Option(help="Show the output until the end.")] = True,
    dry_run: DryRun = False,
) -> None:
    """A run as a job of a Ray cluster; submitting it again resumes."""
    settings = config.load(run, overrides or [])
    from cluster.actors import jobs

    order = jobs.JobRequest(
        command=command,
        working_dir=working_dir,
        runtime_env=jobs.read_runtime_env(runtime_env),
        grace_s=grace,
        cpus=cpus,
        gpus=gpus,
        memory=memory,
    )
    asked = jobs.request(settings, run, overrides or [], order)
    if dry_run:
        typer.echo(json.dumps(asked, indent=2))
        return
    server = jobs.client(address)
    number = jobs.submit(server, asked)
    typer.echo(f"job: {number}")
    if wait:
        jobs.follow(server, number)


@job.command()
def status(number: JobId, address: Address = None) -> None:
    """Whether a job runs, and what it said last."""
    from cluster.actors import jobs

    found = jobs.find(jobs.client(address), number)
    typer.echo(f"{number}: {found.status.value} {found.message or ''}")


@job.command()
def logs(
    number: JobId,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", help="Until the job ends.")] = False,
) -> None:
    """What a job printed."""
    from cluster.actors import jobs

    server = jobs.client(address)
    jobs.find(server, number)
    if follow:
        jobs.follow(server, number)
    else:
        typer.echo(server.get_job_logs(number))


@job.command()
def stop(
    number: JobId,
    address: Address = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait for it.")] = 180.0,
) -> None:
    """Let a job save and end; submitting the run again resumes."""
    from cluster.actors import jobs

    typer.echo(f"{number}: {jobs.stop(jobs.client(address), number, timeout_s=timeout)}")
