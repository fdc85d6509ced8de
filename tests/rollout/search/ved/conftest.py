"""Fixtures: a world that a narrow beam leaves much of, and an engine with values."""

import pytest

from orchard.testing import TinySetup, tiny_setup
from rollout.engine.torch import TorchEngine
from tests.fixtures.values import with_head


@pytest.fixture(scope="session")
def wide() -> TinySetup:
    """A world in which a narrow beam leaves much to be found."""
    return tiny_setup(level_size=(6, 5, 6), num_items=90, lengths=(0, 3, 1, 7, 2))


@pytest.fixture(scope="session")
def engine(wide: TinySetup) -> TorchEngine:
    return with_head(wide)
