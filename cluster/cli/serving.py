"""`orchard serve`: the endpoint on this machine, or a Serve config for a cluster.

Serve accepts unknown keys in silence; `check_config` refuses them, with the nearest known one.
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
from orchard.parquet import read_table
from orchard.policy import model
from orchard.policy.store import PolicyFacts
from orchard.settings import ClusterConfig, Config, ServeConfig
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
"""What is below a key, wherever it stands. Other keys hold what Serve or Ray define."""


def resolve(target: Path, overrides: list[str]) -> tuple[Arguments, Config]:
    """What is to be served: a run file (its trained policy) or the folder of a policy.

    Raises:
        ConfigError: neither, or a setting is wrong.
        DataError: the folder holds no policy.
        CheckpointError: what it says of its policy is damaged.
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
    model.check_folder(folder)
    PolicyFacts.read(folder)
    if not (folder / "catalogue").is_dir():
        raise DataError(f"{folder} holds no catalog; give a folder that `orchard` exported")
    serving = settings.serve
    if serving.popularity is None and not target.is_dir():
        found = count_targets(settings, folder.parent / "serve" / "popularity.parquet")
        serving = serving.model_copy(update={"popularity": found})
    absolute = Arguments(policy=folder.resolve(), serve=_absolute(serving))
    return absolute, settings


def serve_here(arguments: Arguments, settings: Config) -> None:
    """Serve until interrupted, on a Ray cluster or a local one of our own."""
    serving = arguments.serve
    cpus = serving.replicas * serving.threads + 1
    logs = arguments.policy.parent / "logs"
    _refuse_taken_port(serving, settings.cluster)
    with ray_session(settings.cluster, cpus=cpus, logs=logs):
        start(arguments)
        try:
            typer.echo(f"serving {arguments.policy} at http://{serving.host}:{serving.port}")
            asyncio.run(_until_told())
        finally:
            ray_serve.shutdown()


def start(arguments: Arguments) -> None:
    """Start the endpoint in the Ray session that there is."""
    serving = arguments.serve
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray_serve.start(
        http_options={"host": serving.host, "port": serving.port, "request_timeout_s": 60},
        logging_config=LoggingConfig(encoding="JSON"),
    )
    ray_serve.run(build(arguments), name=APPLICATION, logging_config={"encoding": "JSON"})


def cluster_config(arguments: Arguments) -> dict[str, Any]:
    """What `serve deploy` takes, complete and checked."""
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
    """The text of a Serve config."""
    return yaml.safe_dump(dict(tree), sort_keys=False)


def read_config(path: Path) -> dict[str, Any]:
    """A Serve config file, checked; raises ConfigError."""
    if not path.is_file():
        raise ConfigError(f"Serve config {path} does not exist; write one with --write-config")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"Serve config {path} is no YAML: {error}") from error
    check_config(tree)
    return tree


def check_config(tree: object) -> None:
    """Raise ConfigError where a Serve config has unknown keys, wrong values or another app."""
    if not isinstance(tree, dict):
        raise ConfigError("a Serve config is a mapping; write one with --write-config")
    whole = cast(dict[str, Any], tree)
    _refuse_unknown(whole, ServeDeploySchema, "")
    try:
        checked = ServeDeploySchema.model_validate(whole)
        for app in checked.applications:
            if app.import_path == IMPORT_PATH:
                Arguments.model_validate(app.args)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"Serve config: {where}: {first['msg']}") from error


def _refuse_unknown(tree: Mapping[str, Any], shape: type[BaseModel], prefix: str) -> None:
    known = {name for field in shape.model_fields.items() for name in (field[0], field[1].alias)}
    for key, value in tree.items():
        if key not in known:
            near = difflib.get_close_matches(key, [n for n in known if n], n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "remove it"
            raise ConfigError(f"unknown key {prefix}{key} in the Serve config; {hint}")
        below = _SHAPES.get(key)
        if below is None:
            continue
        for place, one in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(one, dict):
                at = f"{key}.{place}" if isinstance(value, list) else key
                _refuse_unknown(cast(dict[str, Any], one), below, f"{prefix}{at}.")


def count_targets(settings: Config, path: Path) -> Path | None:
    """How often each item followed a training history, as a file; None without training data."""
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
    partial = path.with_name(f".{path.name}.partial")
    pq.write_table(table, partial)
    partial.replace(path)
    return path


def _absolute(serving: ServeConfig) -> ServeConfig:
    """Replicas have another working directory."""
    paths = {
        name: value.resolve()
        for name in ServeConfig.model_fields
        if isinstance(value := getattr(serving, name), Path)
    }
    variants = {
        name: one.model_copy(update={"policy": one.policy.resolve()})
        for name, one in serving.variants.items()
    }
    return serving.model_copy(update={**paths, "variants": variants})


def _refuse_taken_port(serving: ServeConfig, cluster: ClusterConfig) -> None:
    """Say so before the policy is loaded for nothing."""
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


async def _until_told() -> None:
    """Return on SIGTERM and on Ctrl-C."""
    told, loop = asyncio.Event(), asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):  # after ray.init, which sets its own
        loop.add_signal_handler(name, told.set)
    await told.wait()
