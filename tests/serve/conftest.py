"""Fixtures: a tiny served catalog, its folder, and brute-force scores of its items."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchard.policy import value_head
from orchard.testing import TinySetup, brute_force, tiny_setup
from rollout.engine.torch import TorchEngine
from serve.testing import TinyShop, export_policy, make_catalog_store
from tests.fixtures.endpoint import TOKEN


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

    @cache
    def score(history: tuple[int, ...]) -> np.ndarray:
        rows = np.array(history, np.int64)
        token, _ = world.tokenizer.encode_history(rows, np.array([0, len(rows)]))
        return brute_force(world.model, world.tokenizer, token)

    return lambda history: score(tuple(history)).copy()


@pytest.fixture
def folder(shop_world: TinySetup, tmp_path: Path, _operator_token: None) -> Path:
    """Export a policy as training does, with all files that the settings can refer to."""
    export_policy(shop_world, tmp_path / "policy", step=3)
    ids = np.arange(40)
    pq.write_table(
        pa.table({"item_id": ids, "price": ids % 7, "stock": ids % 2 == 0}),
        tmp_path / "attributes.parquet",
    )
    pq.write_table(pa.table({"item_id": ids, "count": 40 - ids}), tmp_path / "popularity.parquet")
    pq.write_table(
        pa.table({"user_id": ["ann", "bob"], "history": [[1, 2, 3], [30]]}),
        tmp_path / "histories.parquet",
    )
    return tmp_path / "policy"


@pytest.fixture
def _operator_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHARD_SERVE_TOKEN", TOKEN)
