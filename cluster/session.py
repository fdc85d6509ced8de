"""The Ray session of a command: an existing cluster, or a local one of its own."""

import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import ray

from orchard.config import ClusterConfig, Config
from orchard.errors import ConfigError


@contextmanager
def ray_session(settings: ClusterConfig, *, cpus: int) -> Generator[None]:
    """Join a cluster (`cluster.address` or RAY_ADDRESS), or run a local one and stop it after.

    An outer session is joined as it is, so that several phases can share one.

    Raises:
        ConfigError: the named cluster cannot be reached.
    """
    if ray.is_initialized():
        yield
        return
    address = settings.address or os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError) as error:
            raise ConfigError(
                f"no Ray cluster answers at {address}: {error}; start one, or unset "
                "cluster.address and RAY_ADDRESS to run locally"
            ) from error
    else:
        # A local session listens on the loopback interface and lives as long as this process.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        # Here the workers are the run; at Ray's nice 15 any other process would starve them.
        os.environ.setdefault("RAY_worker_niceness", "0")
        ray.init(address="local", num_cpus=settings.cpus or cpus, include_dashboard=False, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


def cpus_needed(config: Config) -> int:
    """Logical CPUs that the actors of a run ask for, and one for Ray Train's own."""
    return config.rollout.actors + config.rewards.actors + config.learner.workers + 2
