"""Setup that all tests share: few threads, one Ray, and where real data may lie."""

import os

# Before torch and Ray are imported: the tests, the actors and the learner share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# Ray's workers are polite by default (nice 15): on a busy machine they would miss every deadline.
os.environ.setdefault("RAY_worker_niceness", "0")

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parents[1]
pytest_plugins = ["tests.fixtures.registries", "tests.fixtures.runs", "tests.fixtures.trees"]

# How long an example takes says more about what else the machine does than about the code.
settings.register_profile("orchard", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("orchard")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray for the whole session; only what was started here is stopped."""
    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data sets: `ORCHARD_DATA` names their folder, `../shared/data` by default."""
    folder = Path(os.environ.get("ORCHARD_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"there are no real data sets in {folder}; set ORCHARD_DATA to their folder")
    return folder
