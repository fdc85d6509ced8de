"""Run the endpoint on this machine, or write and check a Ray Serve config for a cluster.

Ray Serve ignores unknown keys silently; `check_config` rejects them and suggests the nearest key.
"""

import asyncio
import difflib
import logging
import signal
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import typer
import yaml
from pydantic import BaseModel, ValidationError
from ray import serve as ray_serve
from ray.serve.schema import (
    DeploymentSchema,
    HTTPOptionsSchema,
    LoggingConfig,
    RayActorOptionsSchema,
    ServeApplicationSchema,
    ServeDeploySchema,
)

from cluster.actors.session import address_of, ray_session
from orchard import config
from orchard.errors import ConfigError, DataError
from orchard.folders import atomic_file
from orchard.parquet import read_table
from orchard.policy import model
from orchard.policy.store import PolicyFacts
from orchard.settings import ClusterConfig, Config, ServeConfig
from rollout.engine.registry import ENGINES
from serve.app import Arguments, build, options

APPLICATION = "orchard"
IMPORT_PATH = "serve.app:build"
_SHAPES: dict[str, type[BaseModel]] = {
    "http_options": HTTPOptionsSchema,
    "logging_config": LoggingConfig,
    "applications": ServeApplicationSchema,
    "deployments": DeploymentSchema,
    "ray_actor_options": RayActorOptionsSchema,
    "args": Arguments,
    "serve": ServeConfig,
}
"""Schema of the value below each key, at any depth; other keys are defined by Serve or Ray."""


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
    ENGINES.check_name(settings.serve.engine, "serve.engine")
    model.check_folder(folder)
    PolicyFacts.read(folder)
    if not (folder / "catalogue").is_dir():
        raise DataError(f"{folder} holds no catalog; give a folder that `orchard` exported")
    serving = settings.serve
    if serving.popularity is None and not target.is_dir():
        counts = count_targets(settings, folder.parent / "serve" / "popularity.parquet")
        serving = serving.model_copy(update={"popularity": counts})
    return Arguments(policy=folder.resolve(), serve=_absolute(serving)), settings


def serve_here(arguments: Arguments, settings: Config) -> None:
    """Serve until interrupted, on an existing Ray cluster or a local one."""
    serving = arguments.serve
    cpus = serving.replicas * serving.threads + 1
    logs = arguments.policy.parent / "logs"
    _refuse_taken_port(serving, settings.cluster)
    with ray_session(settings.cluster, cpus=cpus, logs=logs):
        start(arguments)
        try:
            typer.echo(f"serving {arguments.policy} at http://{serving.host}:{serving.port}")
            asyncio.run(_wait_for_signal())
        finally:
            ray_serve.shutdown()


def start(arguments: Arguments) -> None:
    """Start the endpoint in the current Ray session."""
    serving = arguments.serve
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray_serve.start(
        http_options={"host": serving.host, "port": serving.port, "request_timeout_s": 60},
        logging_config=LoggingConfig(encoding="JSON"),
    )
    ray_serve.run(build(arguments), name=APPLICATION, logging_config={"encoding": "JSON"})


def cluster_config(arguments: Arguments) -> dict[str, Any]:
    """Return a complete, checked config for `serve deploy`."""
    serving = arguments.serve
    tree: dict[str, Any] = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": serving.port, "request_timeout_s": 60},
        "logging_config": {"encoding": "JSON", "log_level": "INFO"},
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "args": arguments.model_dump(mode="json", exclude_none=True, exclude_defaults=True),
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


def check_config(tree: object) -> None:
    """Raise ConfigError for unknown keys or wrong values, in Serve's schema or this endpoint's."""
    if not isinstance(tree, dict):
        raise ConfigError("a Serve config is a mapping; write one with --write-config")
    config_tree = cast(dict[str, Any], tree)
    _refuse_unknown(config_tree, ServeDeploySchema, "")
    try:
        checked = ServeDeploySchema.model_validate(config_tree)
        for app in checked.applications:
            if app.import_path == IMPORT_PATH:
                arguments = Arguments.model_validate(app.args)
                ENGINES.check_name(arguments.serve.engine, "serve.engine")
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"Serve config: {key}: {first['msg']}", code="config.bad_value"
        ) from error


def _refuse_unknown(tree: Mapping[str, Any], shape: type[BaseModel], prefix: str) -> None:
    """Raise ConfigError for a key that the schema of its level does not define."""
    known = {name for field in shape.model_fields.items() for name in (field[0], field[1].alias)}
    for key, value in tree.items():
        if key not in known:
            matches = difflib.get_close_matches(key, [n for n in known if n], n=1, cutoff=0.5)
            hint = f"did you mean {matches[0]}?" if matches else "remove it"
            raise ConfigError(
                f"unknown key {prefix}{key} in the Serve config; {hint}", code="config.unknown_key"
            )
        child_shape = _SHAPES.get(key)
        if child_shape is None:
            continue
        for index, child in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(child, dict):
                path = f"{key}.{index}" if isinstance(value, list) else key
                _refuse_unknown(cast(dict[str, Any], child), child_shape, f"{prefix}{path}.")


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
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"item_id": counted.field("values"), "count": counted.field("counts")})
    with atomic_file(path) as partial:
        pq.write_table(table, partial)
    return path


def _absolute(serving: ServeConfig) -> ServeConfig:
    """Return the settings with absolute paths, since replicas have another working directory."""
    paths = {
        name: value.resolve()
        for name in ServeConfig.model_fields
        if isinstance(value := getattr(serving, name), Path)
    }
    variants = {
        name: variant.model_copy(update={"policy": variant.policy.resolve()})
        for name, variant in serving.variants.items()
    }
    return serving.model_copy(update={**paths, "variants": variants})


def _refuse_taken_port(serving: ServeConfig, cluster: ClusterConfig) -> None:
    """Raise ConfigError for a port in use, before the policy is loaded."""
    if address_of(cluster) is not None or serving.port == 0:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((serving.host, serving.port))
        except OSError as error:
            raise ConfigError(
                f"port {serving.port} of {serving.host} cannot be had: {error.strerror}; "
                "choose another one with serve.port="
            ) from error


async def _wait_for_signal() -> None:
    """Wait for SIGTERM or Ctrl-C."""
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):  # after ray.init, which sets its own
        loop.add_signal_handler(name, stopped.set)
    await stopped.wait()
