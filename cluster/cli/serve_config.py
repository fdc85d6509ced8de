"""Check a Ray Serve config, at every depth.

Ray Serve ignores unknown keys silently; `check_config` refuses them and suggests the nearest key.
It also refuses arguments of the endpoint that contradict what the config says elsewhere.
"""

import difflib
import types
from collections.abc import Mapping
from typing import Annotated, Any, Union, cast, get_args, get_origin

from pydantic import BaseModel, ValidationError
from ray.runtime_env import RuntimeEnv, RuntimeEnvConfig
from ray.serve.config import AutoscalingPolicy
from ray.serve.schema import ServeDeploySchema

from orchard.errors import ConfigError
from rollout.engine.registry import ENGINES
from serve.app import DEPLOYMENT, Arguments

IMPORT_PATH = "serve.app:build"


def check_config(tree: object) -> None:
    """Raise ConfigError for unknown keys or wrong values, in Serve's schema or this endpoint's."""
    if not isinstance(tree, dict):
        raise ConfigError("a Serve config is a mapping; write one with --write-config")
    config_tree = cast(dict[str, Any], tree)
    _refuse_unknown(config_tree, ServeDeploySchema, "")
    _validate(ServeDeploySchema, config_tree, "")
    for index, app in enumerate(config_tree.get("applications", [])):
        if app.get("import_path") != IMPORT_PATH:
            continue
        prefix = f"applications.{index}."
        args = app.get("args") or {}
        _refuse_unknown(args, Arguments, f"{prefix}args.")
        _validate(Arguments, args, f"{prefix}args.")
        ENGINES.check_name(Arguments.model_validate(args).serve.engine, "serve.engine")
        _refuse_contradictions(config_tree, app, args.get("serve") or {}, prefix)


def _validate(shape: type[BaseModel], value: object, prefix: str) -> None:
    """Raise ConfigError unless the value fits the schema."""
    try:
        shape.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = prefix + ".".join(str(part) for part in first["loc"])
        message = str(first["msg"]).removeprefix("Value error, ")
        raise ConfigError(
            f"Serve config: {key.rstrip('.')}: {message}", code="config.bad_value"
        ) from error


def _refuse_unknown(tree: Mapping[str, Any], shape: type[BaseModel], prefix: str) -> None:
    """Raise ConfigError for a key that the schema of its level does not define."""
    field_of = {name: field for name, field in shape.model_fields.items()}
    field_of |= {field.alias: field for field in shape.model_fields.values() if field.alias}
    renamed: Mapping[str, str] = getattr(shape, "renamed", {})
    for key, value in tree.items():
        field = field_of.get(renamed.get(key, key))
        if field is None:
            raise _unknown(key, prefix, field_of)
        _check_value(value, field.annotation, f"{prefix}{key}")
        if key == "autoscaling_policy" and isinstance(value, dict):  # a plain mapping in Serve
            _check_value(cast(dict[str, Any], value), AutoscalingPolicy, f"{prefix}{key}")
        if key == "runtime_env" and isinstance(value, dict):
            _check_runtime_env(cast(dict[str, Any], value), f"{prefix}{key}.")


def _check_value(value: object, kind: Any, path: str) -> None:
    """Check the keys below a value whose type the schema gives as `kind`."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        _check_value(value, parts[0], path)
    elif origin in (Union, types.UnionType):
        shapes = [part for part in parts if _is_model(part)]
        if isinstance(value, dict) and len(shapes) == 1:
            _refuse_unknown(cast(dict[str, Any], value), shapes[0], f"{path}.")
            _validate(shapes[0], value, f"{path}.")  # Serve takes a plain mapping unchecked
        for part in parts:
            if not _is_model(part):
                _check_value(value, part, path)
    elif _is_model(kind):
        if isinstance(value, dict):
            _refuse_unknown(cast(dict[str, Any], value), kind, f"{path}.")
    elif isinstance(value, list) and parts:
        for index, child in enumerate(cast(list[Any], value)):
            _check_value(child, parts[0], f"{path}.{index}")
    elif isinstance(value, dict) and len(parts) == 2:
        for key, child in cast(dict[str, Any], value).items():
            _check_value(child, parts[1], f"{path}.{key}")


def _check_runtime_env(tree: Mapping[str, Any], prefix: str) -> None:
    """Raise ConfigError for a key that Ray's runtime environments do not have."""
    known = [name for name in RuntimeEnv.known_fields if not name.startswith("_")]
    for key in tree:
        if key not in RuntimeEnv.known_fields:
            raise _unknown(key, prefix, known)
    for key in tree.get("config") or {}:
        if key not in RuntimeEnvConfig.known_fields:
            raise _unknown(key, f"{prefix}config.", RuntimeEnvConfig.known_fields)


def _refuse_contradictions(
    tree: Mapping[str, Any], app: Mapping[str, Any], serving: Mapping[str, Any], prefix: str
) -> None:
    """Raise ConfigError where the endpoint's arguments say something else than the config."""
    said: list[tuple[str, Any, str, Any]] = []  # key of the argument, value, key beside it, value
    for index, deployment in enumerate(app.get("deployments") or []):
        path = f"{prefix}deployments.{index}"
        if deployment.get("name") != DEPLOYMENT:
            raise ConfigError(
                f"{path}.name = {deployment.get('name')!r} is not a deployment of the endpoint; "
                f"its name is {DEPLOYMENT}"
            )
        if deployment.get("num_replicas") is not None:
            key = f"{path}.num_replicas"
            said.append(("replicas", serving.get("replicas"), key, deployment["num_replicas"]))
        if deployment.get("autoscaling_config") is not None and "replicas" in serving:
            raise ConfigError(
                f"{prefix}args.serve.replicas = {serving['replicas']} and "
                f"{path}.autoscaling_config are both set; keep one"
            )
        cpus = (deployment.get("ray_actor_options") or {}).get("num_cpus")
        if cpus is not None and cpus < serving.get("threads", 1):
            raise ConfigError(
                f"{prefix}args.serve.threads = {serving.get('threads', 1)} and "
                f"{path}.ray_actor_options.num_cpus = {cpus} contradict each other; reserve a CPU "
                "for each thread"
            )
    http = tree.get("http_options") or {}
    said += [
        ("port", serving.get("port"), "http_options.port", http.get("port", 8000)),
        ("host", serving.get("host"), "http_options.host", http.get("host", "0.0.0.0")),
        ("application", serving.get("application"), f"{prefix}name", app.get("name", "default")),
        ("route", serving.get("route"), f"{prefix}route_prefix", app.get("route_prefix", "/")),
    ]
    for key, value, other, beside in said:
        if value is not None and value != beside:
            raise ConfigError(
                f"{prefix}args.serve.{key} = {value!r} and {other} = {beside!r} contradict each "
                f"other; the endpoint would use the second, so remove the first or set both alike"
            )


def _unknown(key: str, prefix: str, known: Any) -> ConfigError:
    """Return the error for an unknown key, with the nearest known one."""
    matches = difflib.get_close_matches(str(key), list(known), n=1, cutoff=0.5)
    hint = f"did you mean {matches[0]}?" if matches else "remove it"
    return ConfigError(
        f"unknown key {prefix}{key} in the Serve config; {hint}", code="config.unknown_key"
    )


def _is_model(kind: Any) -> bool:
    """Return whether a type is a schema."""
    return isinstance(kind, type) and issubclass(kind, BaseModel)
