"""A tiny shop, and brute force over its items."""

from collections.abc import Callable

import numpy as np
import pytest

from orchard.data.prompts import PromptFormat
from orchard.policy import value_head
from orchard.testing import World, brute_force, tiny_world
from rollout.engine.torch import TorchEngine
from serve.testing import Shop, make_stock


@pytest.fixture(scope="session")
def shop_world() -> World:
    world = tiny_world(level_size=(5, 4, 6), num_items=40)
    value_head.attach(world.model, seed=0)
    return world


@pytest.fixture
def shop(shop_world: World) -> Shop:
    world = shop_world
    engine = TorchEngine(world.model, world.catalogue.trie, world.vocabulary, world.version)
    return Shop(world=world, engine=engine, stock=make_stock(world))


@pytest.fixture(scope="session")
def leaf_logprob(shop_world: World) -> Callable[[list[int]], np.ndarray]:
    """Log-probability of every leaf after a history, by brute force."""
    world = shop_world
    form = PromptFormat(catalogue=world.catalogue, vocabulary=world.vocabulary)

    def work(history: list[int]) -> np.ndarray:
        rows = np.array(history, np.int64)
        token, _ = form.tokens(rows, np.array([0, len(rows)]))
        return brute_force(world.model, world.vocabulary, world.catalogue, token)

    return work
