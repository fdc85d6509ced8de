"""Join an existing Ray cluster for a command, or start a local one."""

import logging
import os
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RpcError

from cluster.actors.reach import check_cluster
from orchard.errors import ConfigError
from orchard.settings import ClusterConfig, Config

WORKER_OUTPUT = ("worker-*", "train/*.log")
"""Patterns of the log files that actors and Ray Train workers print to."""


@contextmanager
def ray_session(settings: ClusterConfig, *, cpus: int, logs: Path) -> Generator[None]:
    """Join a cluster (`cluster.address` or RAY_ADDRESS), or run a local one and stop it after.

    The output of the actors appears in `logs/<session>`: a link into Ray's own folder, and after a
    local session a copy of the files. An already initialized session is used unchanged.

    Raises:
        ConfigError: the named cluster cannot be reached.
    """
    if ray.is_initialized():
        yield
        return
    address = address_of(settings)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        check_cluster(address)
        try:
            context = ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError, RpcError) as error:
            raise ConfigError(
                f"no Ray cluster answers at {address}: {' '.join(str(error).split())[:300]}; start "
                "one, or unset cluster.address and RAY_ADDRESS to run locally"
            ) from error
    else:
        # Ray listens on the machine's address, not on the loopback interface alone, and runs the
        # code that it receives. Unless RAY_AUTH_MODE says otherwise it therefore requires a token.
        # Set one for this process: Ray reads it once, and else writes one into the home folder.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # The workers do the work of the run; at Ray's nice 15 any other process would starve them.
        os.environ.setdefault("RAY_worker_niceness", "0")
        context = ray.init(
            address="local", num_cpus=settings.cpus or cpus, include_dashboard=False, **quiet
        )
    # A client of a remote cluster (ray://) has no session folder on its machine.
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
    """Link `logs/<session>` to the log folder of a Ray session."""
    logs.mkdir(parents=True, exist_ok=True)
    link = logs / session.name
    link.unlink(missing_ok=True)
    link.symlink_to(session / "logs", target_is_directory=True)


def keep_logs(session: Path, logs: Path) -> None:
    """Replace the link to an ended session by copies of its workers' non-empty output."""
    kept = logs / session.name
    kept.unlink()
    kept.mkdir()
    for pattern in WORKER_OUTPUT:
        for file in (session / "logs").glob(pattern):
            if file.stat().st_size:
                shutil.copy2(file, kept)


def address_of(settings: ClusterConfig) -> str | None:
    """Return the address of the cluster to join; None to start a local one."""
    return settings.address or os.environ.get("RAY_ADDRESS") or None


def runs_elsewhere(settings: ClusterConfig) -> bool:
    """Return whether a run joins a cluster, whose machines are not known here."""
    return not settings.in_process and address_of(settings) is not None


def cpus_needed(config: Config) -> int:
    """Return the number of logical CPUs that a run needs.

    Besides its actors, it needs one for Ray Train's controller and one for the evaluation actor.
    """
    return config.rollout.actors + config.rewards.actors + config.learner.workers + 2
