"""Find out within seconds whether somebody answers at the address of a cluster."""

import os
import socket
from urllib.parse import urlsplit

import grpc

from orchard.errors import ConfigError

PATIENCE_S = 5.0
"""Seconds to wait for an answer. Ray itself waits for minutes, without a word."""


def check_cluster(address: str) -> None:
    """Raise ConfigError unless a Ray cluster answers at `HOST:PORT` or `ray://HOST:PORT`.

    Other addresses, such as `auto`, name no host.
    """
    host, port = _host_and_port(address)
    if host is None or port is None:
        return
    remedy = "start one, or unset cluster.address and RAY_ADDRESS to run locally"
    _check_port(host, port, f"no Ray cluster answers at {address}", remedy)
    if os.environ.get("RAY_USE_TLS", "0") not in ("0", "", "false", "False"):
        return  # whose certificates only Ray knows
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    channel = grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)])
    try:
        grpc.channel_ready_future(channel).result(timeout=PATIENCE_S)
    except grpc.FutureTimeoutError as error:
        raise ConfigError(
            f"something listens at {address}, but it does not speak Ray's protocol within "
            f"{PATIENCE_S:.0f} s; a cluster's port is 6379 by default, 10001 for ray://, and 8265 "
            f"is that of its job server; {remedy}"
        ) from error
    finally:
        channel.close()


def check_job_server(address: str) -> None:
    """Raise ConfigError unless somebody listens at `http://HOST:PORT`."""
    host, port = _host_and_port(address)
    if host is not None and port is not None:
        _check_port(
            host, port, f"no Ray job server answers at {address}", "give --address http://HEAD:8265"
        )


def _check_port(host: str, port: int, trouble: str, remedy: str) -> None:
    try:
        socket.create_connection((host, port), timeout=PATIENCE_S).close()
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise ConfigError(f"{trouble} ({reason}); {remedy}") from error


def _host_and_port(address: str) -> tuple[str | None, int | None]:
    """Split an address; the port of a URL without one is that of its scheme."""
    text = address if "://" in address else f"//{address}"
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return None, None
    defaults = {"http": 80, "https": 443, "ray": 10001}
    return parts.hostname, port or defaults.get(parts.scheme)
