"""Tiny worlds and their reference engines."""

from collections.abc import Callable

import pytest

from orchard.testing import TinySetup, tiny_setup
from rollout.engine.torch import TorchEngine


def engine_of(world: TinySetup) -> TorchEngine:
    return TorchEngine(world.model, world.tokenizer, world.version)


@pytest.fixture(scope="session")
def torch_engine() -> Callable[[TinySetup], TorchEngine]:
    """The reference engine of a world."""
    return engine_of


@pytest.fixture(
    scope="session",
    params=[
        {},
        {"varying_depth": True},
        {"varying_depth": True, "level_size": (3, 2, 2, 3), "seed": 4},
        {"level_size": (1, 4, 6), "seed": 1},  # the root has a single child
    ],
    ids=["level", "varying", "deep", "forced-root"],
)
def world(request: pytest.FixtureRequest) -> TinySetup:
    """A world that tests only read."""
    return tiny_setup(**request.param)


@pytest.fixture(scope="session")
def engine(world: TinySetup) -> TorchEngine:
    """Its reference engine."""
    return engine_of(world)
