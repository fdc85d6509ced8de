"""Start and stop one endpoint on Ray Serve, and leave whatever else runs there alone."""

import errno
import json
import logging
import re
import socket
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray import serve as ray_serve
from ray.serve import context
from ray.serve.schema import LoggingConfig

from orchard.errors import ConfigError
from orchard.settings import ServeConfig
from serve.app import Arguments, build

_ANY = ("0.0.0.0", "::")
_PROXY_CALLBACK = "serve.http.middleware.proxy_middlewares"


@dataclass(frozen=True, kw_only=True)
class ServeInstance:
    """Applications on the cluster's Serve."""

    host: str
    port: int
    route_of: Mapping[str, str | None]
    """Route prefix of each application."""
    proxy_ips: tuple[str, ...]
    """Addresses of the nodes that have a proxy."""


def serve_instance() -> ServeInstance | None:
    """Describe Serve on the cluster of this session, None where it does not run."""
    # Serve's public status names neither ports nor routes.
    client: Any = context._get_global_client(raise_if_no_controller_running=False)  # pyright: ignore[reportPrivateUsage]
    if client is None:
        return None
    details: dict[str, Any] = client.get_serve_details()
    http = client.http_config
    return ServeInstance(
        host=str(http.host), port=int(http.port),
        route_of={n: app.get("route_prefix") for n, app in details["applications"].items()},
        proxy_ips=tuple(proxy["node_ip"] for proxy in details["proxies"].values()),
    )  # fmt: skip


def check_free(serving: ServeConfig, instance: ServeInstance | None) -> None:
    """Check that name, route and port of an endpoint can be had.

    Raises:
        ConfigError: one is taken, or Serve already listens elsewhere than asked for.
    """
    if instance is None:
        refuse_taken_port(serving)
        return
    for name, route in instance.route_of.items():
        if name == serving.application:
            raise ConfigError(
                f"the cluster already serves an application {name!r} at {route}; end it, or choose "
                "another name and route with serve.application=NAME serve.route=/NAME"
            )
        if route == serving.route:
            raise ConfigError(
                f"the route {route} is taken by the application {name!r}; choose another one with "
                "serve.route=/NAME"
            )
    for key, wanted in (("host", instance.host), ("port", instance.port)):
        asked = getattr(serving, key)
        if key in serving.model_fields_set and asked not in (wanted, 0):
            raise ConfigError(
                f"serve.{key} = {asked}, but Serve already runs on this cluster with {key} "
                f"{wanted}, the same for all its applications; leave serve.{key} out"
            )


def start(arguments: Arguments) -> str:
    """Start the endpoint in the current Ray session; return the address at which it answers.

    Raises:
        ConfigError: its name, route or port is taken, it cannot start, or it does not answer.
    """
    serving, instance = arguments.serve, serve_instance()
    check_free(serving, instance)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if instance is None:
        port = serving.port or _free_port(serving.host)
        variables = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": _PROXY_CALLBACK}
        ray_serve.start(
            http_options={"host": serving.host, "port": port, "request_timeout_s": 60},
            logging_config=LoggingConfig(encoding="JSON"),
            controller_options={"runtime_env": {"env_vars": variables}},
        )
    try:
        ray_serve.run(
            build(arguments), name=serving.application, route_prefix=serving.route,
            logging_config={"encoding": "JSON"},
        )  # fmt: skip
        return address_of(serving)
    except RuntimeError as error:
        stop(serving, own=instance is None)
        raise ConfigError(f"the endpoint cannot start: {_reason(str(error))}") from error
    except BaseException:
        stop(serving, own=instance is None)
        raise


def stop(serving: ServeConfig, *, own: bool) -> None:
    """End the endpoint's application alone.

    Serve itself ends too if the endpoint started it (`own`) and no other application is left.
    """
    instance = serve_instance()
    if instance is None:
        return
    if serving.application in instance.route_of:
        ray_serve.delete(serving.application)
    if own and not instance.route_of.keys() - {serving.application}:
        ray_serve.shutdown()


def address_of(serving: ServeConfig) -> str:
    """Return the address at which the endpoint answers this machine.

    Raises:
        ConfigError: it answers at none.
    """
    instance = serve_instance()
    if instance is None:
        raise ConfigError("Serve has ended; start the endpoint again")
    hosts = [instance.host]
    if instance.host in _ANY:
        hosts = ["127.0.0.1" if instance.host == "0.0.0.0" else "::1", *instance.proxy_ips]
    route = serving.route if serving.route.endswith("/") else f"{serving.route}/"
    addresses = [f"http://{_in_url(host)}:{instance.port}{route}" for host in hosts]
    for address in addresses:
        if _answers(address):
            return address.removesuffix("/") if route == "/" else address
    raise ConfigError(
        f"the endpoint runs, but does not answer at {', '.join(addresses)} from this machine; on a "
        "cluster of other machines set serve.host=0.0.0.0, or use --write-config"
    )


def refuse_taken_port(serving: ServeConfig) -> None:
    """Raise ConfigError unless the address can be bound, saying what is wrong with which part."""
    host, port = serving.host, serving.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(
            f"serve.host = {host!r} is not a known host: {error.strerror}; give an address of this "
            "machine, such as 127.0.0.1 or 0.0.0.0"
        ) from error
    found.sort(key=lambda each: each[0] != socket.AF_INET)  # as Serve's proxy reads a name
    family, kind, protocol, _, address = found[0]
    try:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise ConfigError(
                f"port {port} of {host} is not available: {error.strerror}; choose another one "
                "with serve.port="
            ) from error
        raise ConfigError(
            f"serve.host = {host!r} is not an address of this machine: {error.strerror}; give one "
            "that is, such as 127.0.0.1 or 0.0.0.0"
        ) from error


def _free_port(host: str) -> int:
    """Return a port that is free at this moment."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.bind(address)
        return int(probe.getsockname()[1])


def _in_url(host: str) -> str:
    """Return a host as it is written in an address."""
    return f"[{host}]" if ":" in host else host


def _answers(address: str) -> bool:
    """Return whether an endpoint answers at an address."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{address}healthz", timeout=5) as reply:
            return json.load(reply) == {"status": "alive"}
    except (OSError, ValueError):
        return False


def _reason(text: str) -> str:
    """Return the sentence of the last error in a traceback."""
    errors = re.findall(r"^[\w.]*(?:Error|Exception|Interrupted): (.+)$", text, re.MULTILINE)
    return errors[-1] if errors else text.strip().splitlines()[-1]
