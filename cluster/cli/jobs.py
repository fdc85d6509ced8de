"""Commands that run Orchard as Ray jobs: `orchard submit` and `orchard job ...`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.options import DryRun, Overrides, RunFile
from orchard import config

job = typer.Typer(help="Inspect, follow and stop submitted runs.", no_args_is_help=True)

Address = Annotated[
    str | None, typer.Option(help="Job server; RAY_API_SERVER_ADDRESS or RAY_ADDRESS by default.")
]
JobId = Annotated[str, typer.Argument(help="Job ID that `orchard submit` printed.")]


def submit(
    run: RunFile,
    overrides: Overrides = None,
    command: Annotated[str, typer.Option(help="Command to run: sft or train.")] = "train",
    address: Address = None,
    working_dir: Annotated[
        Path, typer.Option(help="Folder to upload; holds the code and the run file.")
    ] = Path(),
    runtime_env: Annotated[
        Path | None, typer.Option(help="YAML file with a Ray runtime environment.")
    ] = None,
    grace: Annotated[
        float, typer.Option(min=1, help="Seconds to save a checkpoint in when stopped.")
    ] = 120.0,
    cpus: Annotated[float | None, typer.Option(help="CPUs for the driver.")] = None,
    gpus: Annotated[float | None, typer.Option(help="GPUs for the driver.")] = None,
    memory: Annotated[int | None, typer.Option(help="Bytes of memory for the driver.")] = None,
    wait: Annotated[bool, typer.Option(help="Show the output until the job ends.")] = True,
    dry_run: DryRun = False,
) -> None:
    """Submit a run as a job to a Ray cluster; submit it again to resume."""
    settings = config.load(run, overrides or [])
    from cluster.actors import jobs
    from cluster.training.checks import check_names

    check_names(settings)
    job_request = jobs.JobRequest(
        command=command,
        working_dir=working_dir,
        runtime_env=jobs.read_runtime_env(runtime_env),
        grace_s=grace,
        cpus=cpus,
        gpus=gpus,
        memory=memory,
    )
    arguments = jobs.request(settings, run, overrides or [], job_request)
    jobs.check_size(arguments["runtime_env"])
    if dry_run:
        typer.echo(json.dumps(arguments, indent=2))
        return
    server = jobs.client(address)
    job_id = jobs.submit(server, arguments)
    typer.echo(f"job: {job_id}")
    if wait:
        jobs.follow(server, job_id)


@job.command()
def status(number: JobId, address: Address = None) -> None:
    """Show the status and the last message of a job."""
    from cluster.actors import jobs

    details = jobs.find(jobs.client(address), number)
    typer.echo(f"{number}: {details.status.value} {details.message or ''}")


@job.command()
def logs(
    number: JobId,
    address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Follow the output until the job ends.")
    ] = False,
) -> None:
    """Show the output of a job."""
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
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds to wait until it has stopped.")
    ] = 180.0,
) -> None:
    """Stop a job after it has saved a checkpoint; submit the run again to resume."""
    from cluster.actors import jobs

    typer.echo(f"{number}: {jobs.stop(jobs.client(address), number, timeout_s=timeout)}")
