"""Run the endpoint, alone or in a closed loop, or write and check a Ray Serve config."""

import asyncio
import logging
import signal
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer
import yaml

from cluster.actors.session import address_of, cpus_needed, ray_session
from cluster.cli import endpoint
from cluster.cli.serve_config import IMPORT_PATH, check_config
from cluster.loop.run import first_policy, loop_folder, run_loop, serve_settings
from cluster.report.report import write_report
from cluster.training.run import prepare
from orchard import config
from orchard.errors import ConfigError, DataError
from orchard.folders import atomic_file
from orchard.parquet import read_table
from orchard.policy import model
from orchard.policy.store import PolicyFacts, open_tokenizer
from orchard.registry import import_plugins
from orchard.settings import Config, ServeConfig
from rollout.engine.registry import ENGINES
from serve.app import Arguments, options
from serve.shared_state import SharedState

_SAID_ELSEWHERE = {"host", "port", "application", "route", "logs"}
"""Settings that a Serve config holds outside the endpoint's arguments, or that a cluster has."""


def resolve(target: Path, overrides: list[str]) -> tuple[Arguments, Config]:
    """Resolve a run file (its trained policy) or a policy folder to the endpoint's arguments.

    Raises:
        ConfigError: the target is neither, or a setting is wrong.
        DataError: the folder holds no policy.
        CheckpointError: the metadata of the policy is damaged.
    """
    if target.is_dir():
        tree = {"name": target.resolve().name.strip(".") or "policy", "data": {"path": str(target)}}
        settings, folder = config.parse(tree, overrides), target
    else:
        settings = config.load(target, overrides)
        trained = settings.run_dir / "policy"
        folder = trained if trained.is_dir() else settings.run_dir / "warm_start"
        if not folder.is_dir():
            raise DataError(
                f"run {settings.name} has no policy yet: neither {trained} nor {folder} exists; "
                "run `orchard sft` or `orchard train` first"
            )
    import_plugins(settings.plugins)
    ENGINES.check_name(settings.serve.engine, "serve.engine")
    model.check_folder(folder)
    PolicyFacts.read(folder)
    if not (folder / "catalogue").is_dir():
        raise DataError(f"{folder} holds no catalog; give a folder that `orchard` exported")
    serving = settings.serve
    if serving.popularity is None and not target.is_dir():
        state = serving.state or folder.parent / "serve"
        counts = count_targets(settings, state / "popularity.parquet")
        serving = serving.model_copy(update={"popularity": counts})
    # Not resolved: a symbolic link that is switched to another policy is followed.
    arguments = Arguments(
        policy=folder.absolute(), plugins=settings.plugins, serve=_absolute(serving)
    )
    return arguments, settings


def serve_here(arguments: Arguments, settings: Config) -> None:
    """Serve until interrupted, on an existing Ray cluster or a local one.

    Raises:
        ConfigError: a folder cannot be written, or a name, route, host or port cannot be had.
        LedgerError: the ledger of catalog deltas is damaged.
    """
    serving = arguments.serve
    cpus = serving.replicas * serving.threads + 1
    state = state_of(arguments)
    logs = serving.logs or state / "logs"
    _check_writable(logs, "serve.logs, or serve.state")
    SharedState(state, open_tokenizer(arguments.policy).catalog.digest).verify()
    if address_of(settings.cluster) is None:
        endpoint.refuse_taken_port(serving)
    with ray_session(settings.cluster, cpus=cpus, logs=logs):
        own = endpoint.serve_instance() is None
        address = endpoint.start(arguments)
        try:
            typer.echo(f"serving {arguments.policy} at {address}")
            asyncio.run(_wait_for_signal())
        finally:
            endpoint.stop(serving, own=own)


def start(arguments: Arguments) -> str:
    """Start the endpoint in the current Ray session; see `endpoint.start`."""
    return endpoint.start(arguments)


def state_of(arguments: Arguments) -> Path:
    """Return the folder of the endpoint's shared state."""
    return arguments.serve.state or arguments.policy.parent / "serve"


def cluster_config(arguments: Arguments) -> dict[str, Any]:
    """Return a complete, checked config for `serve deploy`."""
    serving = arguments.serve
    tree: dict[str, Any] = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": serving.port, "request_timeout_s": 60},
        "logging_config": {"encoding": "JSON", "log_level": "INFO"},
        "applications": [
            {
                "name": serving.application,
                "route_prefix": serving.route,
                "import_path": IMPORT_PATH,
                "args": arguments.model_dump(
                    mode="json",
                    exclude_none=True,
                    exclude_defaults=True,
                    exclude={"serve": _SAID_ELSEWHERE},
                ),
                "deployments": [options(serving)],
            }
        ],
    }
    check_config(tree)
    return tree


def as_yaml(tree: Mapping[str, Any]) -> str:
    """Format a Serve config as YAML."""
    return yaml.safe_dump(dict(tree), sort_keys=False)


def read_config(path: Path) -> dict[str, Any]:
    """Load and check a Serve config file; raises ConfigError."""
    if not path.is_file():
        raise ConfigError(f"Serve config {path} does not exist; write one with --write-config")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"Serve config {path} is no YAML: {error}") from error
    check_config(tree)
    return tree


def count_targets(settings: Config, path: Path) -> Path | None:
    """Write how often each item is a training target; returns None without training data."""
    files = [settings.data.path / name for name in settings.data.train]
    if not all(file.is_file() for file in files):
        return None
    tables = [
        read_table(file, role="split", columns=("target",), remedy="data.train") for file in files
    ]
    target = pa.concat_tables([table.select(["target"]) for table in tables])["target"]
    counted = target.value_counts()
    _check_writable(path.parent, "serve.state, or serve.popularity to counts of your own")
    table = pa.table({"item_id": counted.field("values"), "count": counted.field("counts")})
    with atomic_file(path) as partial:
        pq.write_table(table, partial)
    return path


def _absolute(serving: ServeConfig) -> ServeConfig:
    """Return the settings with absolute paths, since replicas have another working directory."""
    paths = {
        name: value.absolute()
        for name in ServeConfig.model_fields
        if isinstance(value := getattr(serving, name), Path)
    }
    variants = {
        name: variant.model_copy(update={"policy": variant.policy.absolute()})
        for name, variant in serving.variants.items()
    }
    return serving.model_copy(update={**paths, "variants": variants})


def _check_writable(folder: Path, remedy: str) -> None:
    """Create a folder; raise ConfigError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}); set {remedy}") from error


async def _wait_for_signal() -> None:
    """Wait for SIGTERM or Ctrl-C."""
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):  # after ray.init, which sets its own
        loop.add_signal_handler(name, stopped.set)
    await stopped.wait()


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
