"""Setup that all tests share: few threads, one Ray, and where real data may lie."""

import os

# Before torch and Ray are imported: the tests, the actors and the learner share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# Ray's workers are polite by default (nice 15): on a busy machine they would miss every deadline.
os.environ.setdefault("RAY_worker_niceness", "0")

import logging
import sysconfig
from collections.abc import Iterator
from importlib.util import cache_from_source
from pathlib import Path

import jaxtyping._import_hook as hook
import pytest
import ray
import torch
from hypothesis import HealthCheck, settings

# jaxtyping keeps the bytecode of annotated modules apart. The libraries that they import would lie
# there as well, and be compiled at every start where no bytecode is written.
_OF_LIBRARIES = tuple(sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib"))
_cache_of_annotated = hook._optimized_cache_from_source


def _cache(tag: str, /, path: str, debug_override: bool | None = None) -> str:
    if path.startswith(_OF_LIBRARIES):
        return cache_from_source(path, debug_override)
    return _cache_of_annotated(tag, path, debug_override)


hook._optimized_cache_from_source = _cache

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
def _same_start() -> None:
    """Start every test with the same random numbers and one thread of torch.

    Endpoints and fits set the threads of their process; two test processes of two threads each
    wait for one another longer than they compute.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data sets: `ORCHARD_DATA` names their folder, `../shared/data` by default."""
    folder = Path(os.environ.get("ORCHARD_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"there are no real data sets in {folder}; set ORCHARD_DATA to their folder")
    return folder
