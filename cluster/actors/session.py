"""The Ray session of a command: an existing cluster, or a local one of its own."""

import logging
import os
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from orchard.errors import ConfigError
from orchard.settings import ClusterConfig, Config

WORKER_OUTPUT = ("worker-*", "train/*.log")
"""Of the files in a session's log folder, those that actors and Ray Train's workers print to."""


@contextmanager
def ray_session(settings: ClusterConfig, *, cpus: int, logs: Path) -> Generator[None]:
    """Join a cluster (`cluster.address` or RAY_ADDRESS), or run a local one and stop it after.

    What the actors print appears as `logs/<session>`: a link into Ray's own folder, and after a
    local session the files themselves. An outer session is joined as it is.

    Raises:
        ConfigError: the named cluster cannot be reached.
    """
    if ray.is_initialized():
        yield
        return
    address = address_of(settings)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        try:
            context = ray.init(address=address, **quiet)
        except (ConnectionError, ValueError) as error:
            raise ConfigError(
                f"no Ray cluster answers at {address}: {error}; start one, or unset "
                "cluster.address and RAY_ADDRESS to run locally"
            ) from error
    else:
        # Ray listens on the address of the machine, not on the loopback interface alone, and runs
        # what it is sent. Unless RAY_AUTH_MODE says otherwise it therefore asks for a token, which
        # is this process's own: Ray reads it once, and would write one into the home folder.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # Here the workers are the run; at Ray's nice 15 any other process would starve them.
        os.environ.setdefault("RAY_worker_niceness", "0")
        context = ray.init(
            address="local", num_cpus=settings.cpus or cpus, include_dashboard=False, **quiet
        )
    # A client of a cluster elsewhere (ray://) has no session folder on its machine.
    info: dict[str, Any] = getattr(context, "address_info", {})
    session = Path(info["session_dir"]) if "session_dir" in info else None
    if session is not None:
        link_logs(session, logs)
    try:
        yield
    finally:
        ray.shutdown()
        if session is not None and not address:
            keep_logs(session, logs)


def link_logs(session: Path, logs: Path) -> None:
    """Make `logs/<session>` lead to what the workers of a Ray session print."""
    logs.mkdir(parents=True, exist_ok=True)
    link = logs / session.name
    link.unlink(missing_ok=True)
    link.symlink_to(session / "logs", target_is_directory=True)


def keep_logs(session: Path, logs: Path) -> None:
    """Put what the workers of an ended session printed in the place of the link to it."""
    kept = logs / session.name
    kept.unlink()
    kept.mkdir()
    for pattern in WORKER_OUTPUT:
        for file in (session / "logs").glob(pattern):
            if file.stat().st_size:
                shutil.copy2(file, kept)


def address_of(settings: ClusterConfig) -> str | None:
    """The cluster that a command is to join; None where it starts a Ray of its own."""
    return settings.address or os.environ.get("RAY_ADDRESS") or None


def cpus_needed(config: Config) -> int:
    """Logical CPUs that a run asks for.

    Two beside its actors: for Ray Train's controller, and for whoever ranks held-out rows.
    """
    return config.rollout.actors + config.rewards.actors + config.learner.workers + 2
