"""Run the closed loop on one cluster: `orchard loop`."""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import typer

from cluster.actors.session import cpus_needed, ray_session
from cluster.cli import endpoint
from cluster.loop.run import first_policy, loop_folder, run_loop, serve_settings
from cluster.report.report import write_report
from cluster.training.run import prepare
from orchard import config
from orchard.settings import Config, ServeConfig
from serve.app import Arguments


def loop(settings: Config, *, dry_run: bool) -> None:
    """Serve, collect, train, judge and publish, for `loop.rounds` rounds; then write the report."""
    serving = serve_settings(settings)
    if dry_run:
        prepare(settings, "evaluate", policy=first_policy(settings))
        typer.echo(config.dump(settings))
        typer.echo(f"# policy: {first_policy(settings)}\n# loop folder: {loop_folder(settings)}")
        typer.echo("# everything checks out; nothing was started")
        return
    logging.getLogger("orchard").setLevel(logging.INFO)
    cpus = cpus_needed(settings) + serving.replicas * serving.threads + 1
    logs = serving.logs or loop_folder(settings) / "logs"
    with ray_session(settings.cluster, cpus=cpus, logs=logs):
        log = run_loop(settings, partial(served, settings))
    typer.echo(f"rounds: {log}\nreport: {write_report(settings.run_dir)}")


@contextmanager
def served(settings: Config, policy: Path, serving: ServeConfig) -> Generator[str]:
    """Start an endpoint for a policy folder in the current Ray session; end it with the context."""
    arguments = Arguments(policy=policy, plugins=settings.plugins, serve=serving)
    own = endpoint.serve_instance() is None
    address = endpoint.start(arguments)
    try:
        typer.echo(f"serving {policy} at {address}")
        yield address
    finally:
        endpoint.stop(serving, own=own)
