"""Fixtures: a tiny served catalog, and brute-force scores of its items."""

from collections.abc import Callable

import numpy as np
import pytest

from orchard.policy import value_head
from orchard.testing import TinySetup, brute_force, tiny_setup
from rollout.engine.torch import TorchEngine
from serve.testing import TinyShop, make_catalog_store


@pytest.fixture(scope="session")
def shop_world() -> TinySetup:
    world = tiny_setup(level_size=(5, 4, 6), num_items=40)
    value_head.attach(world.model, seed=0)
    return world


@pytest.fixture
def shop(shop_world: TinySetup) -> TinyShop:
    world = shop_world
    engine = TorchEngine(world.model, world.tokenizer, world.version)
    return TinyShop(world=world, engine=engine, catalog_store=make_catalog_store(world))


@pytest.fixture(scope="session")
def leaf_logprob(shop_world: TinySetup) -> Callable[[list[int]], np.ndarray]:
    """Return a function from a history to the log-probability of every leaf, by brute force."""
    world = shop_world

    def score(history: list[int]) -> np.ndarray:
        rows = np.array(history, np.int64)
        token, _ = world.tokenizer.encode_history(rows, np.array([0, len(rows)]))
        return brute_force(world.model, world.tokenizer, token)

    return score
