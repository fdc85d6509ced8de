"""Fixtures: a tiny run whose rows come in three files."""

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from orchard import config
from orchard.data.synthetic import write_world
from orchard.settings import Config
from tests.fixtures.runs import TINY_WORLD

Load = Callable[..., Config]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "data"
    write_world(folder, TINY_WORLD)
    rows = pq.read_table(folder / "train.parquet")
    pq.write_table(rows.slice(0, 100), folder / "early.parquet")
    pq.write_table(rows.slice(100, 60), folder / "later.parquet")
    pq.write_table(rows.slice(160, 30), folder / "latest.parquet")
    return folder


@pytest.fixture
def load(data: Path, tmp_path: Path) -> Load:
    path = tmp_path / "run.toml"
    path.write_text(
        f"""
        name = "toy"
        output = "{tmp_path / "runs"}"
        data.path = "{data}"
        data.train = ["early.parquet"]
        model = {{hidden_size = 16, heads = 2, kv_heads = 1, intermediate_size = 16, layers = 1}}
        [rollout]
        engine = "torch"
        group_size = 6
        threads = 1
        """
    )
    return lambda *overrides: config.load(path, overrides)
