"""Serving on vLLM: the same traced answers as on torch, also after a catalog change."""

from pathlib import Path

import numpy as np
import pytest
import ray

from orchard.settings import RolloutConfig
from orchard.testing import TinySetup, tiny_setup
from rollout.engine.protocol import DecodingBackend
from rollout.engine.torch import TorchEngine
from rollout.engine.vllm import VllmEngine
from serve.decoding.recommender import RankedItems, recommend
from serve.decoding.trace import Trace
from serve.testing import kind, make_catalog_store, query

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow]

QUERIES = [
    query([3, 17, 5], exclude=np.array([3, 17, 5, 8])),
    query([1], exclude=np.array([0, 2, 9])),
    query(list(range(10)), exclude=np.zeros(0, np.int64)),
]


def small_world(num_items: int) -> TinySetup:
    """Create a tiny setup whose code levels do not depend on the number of items."""
    return tiny_setup(level_size=(5, 4, 6), num_items=num_items)


class Replica:
    """Actor with a vLLM engine."""

    def __init__(self, folder: Path) -> None:
        self._world = small_world(40)
        # Too small a cache for three searches of fifty beams at once.
        config = RolloutConfig(threads=1, kv_cache_gib=0.002)
        self._engine = VllmEngine(
            folder, self._world.model, self._world.tokenizer,
            self._world.version, config, seed=0,
        )  # fmt: skip

    def answer(self, num_items: int) -> tuple[list[RankedItems], float, int]:
        """Return answers on a catalog of that size, prefill seconds and number of steps."""
        world = small_world(num_items)
        self._engine.set_catalog(world.catalog)
        trace = Trace(record_steps=True)
        ranked, _ = recommend(
            self._engine,
            make_catalog_store(world).current,
            QUERIES,
            kind(filters=("stocked",)),
            max_history=10,
            trace=trace,
        )
        return ranked, trace.prefill_s, len(trace.steps)


def plain(ranked: list[RankedItems]) -> list[list[tuple[int, float]]]:
    return [
        [(item.item_id, round(item.score or 0.0, 4)) for item in of_query.items]
        for of_query in ranked
    ]


def test_vllm_answers_as_torch_does_on_every_catalog_that_it_turns_to(
    ray_cluster: None, tmp_path: Path
) -> None:
    first = small_world(40)
    replica = ray.remote(Replica).options(num_cpus=1).remote(first.save(tmp_path / "policy"))
    try:
        for num_items in (40, 30, 40):
            world = small_world(num_items)
            engine: DecodingBackend = TorchEngine(first.model, world.tokenizer, world.version)
            expected, _ = recommend(
                engine,
                make_catalog_store(world).current,
                QUERIES,
                kind(filters=("stocked",)),
                max_history=10,
            )
            ranked, prefill_s, num_steps = ray.get(replica.answer.remote(num_items))
            assert plain(ranked) == plain(expected)
            assert all(of_query.items for of_query in ranked)
            assert prefill_s > 0
            assert num_steps > 0
    finally:
        ray.kill(replica)
