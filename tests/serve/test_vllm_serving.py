"""The endpoint's core on vLLM: the same answers as on torch, watched, on another catalog too."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from orchard.settings import RolloutConfig
from orchard.testing import TinySetup, tiny_setup
from orchard.types import Prompts
from rollout.candidates import Candidates
from rollout.engine.protocol import DecodingBackend
from rollout.engine.torch import TorchEngine
from rollout.engine.vllm import VllmEngine
from serve.decoding.recommender import RankedItems, recommend
from serve.decoding.trace import TracedSearch
from serve.testing import kind, make_catalog_store, query

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow]

QUERIES = [
    query([3, 17, 5], exclude=np.array([3, 17, 5, 8])),
    query([1], exclude=np.array([0, 2, 9])),
    query(list(range(10)), exclude=np.zeros(0, np.int64)),
]


def small_world(num_items: int) -> TinySetup:
    """Larger catalogs have the same codes to name their items with."""
    return tiny_setup(level_size=(5, 4, 6), num_items=num_items)


class Replica:
    """A vLLM engine and the store that it answers from."""

    def __init__(self, folder: Path) -> None:
        self._world = small_world(40)
        # A cache that three searches of fifty beams outgrow.
        config = RolloutConfig(threads=1, kv_cache_gib=0.002)
        self._engine = VllmEngine(
            folder, self._world.model, self._world.tokenizer,
            self._world.version, config, seed=0,
        )  # fmt: skip

    def answer(self, num_items: int) -> tuple[list[RankedItems], float, int]:
        """Answers from a catalog of so many items, seconds of prefill, expansions seen."""
        world = small_world(num_items)
        self._engine.set_catalog(world.catalog)
        traces: list[TracedSearch] = []

        class TracingRunner:
            def run(inner, find: Any, prompts: Prompts) -> Candidates:
                traces.append(TracedSearch(find, record_steps=True))
                return self._engine.run(traces[0], prompts)

        found, _ = recommend(
            TracingRunner(),
            make_catalog_store(world).current,
            QUERIES,
            kind(filters=("stocked",)),
            max_history=10,
        )
        return found, traces[0].prefill_s, len(traces[0].steps)


def plain(found: list[RankedItems]) -> list[list[tuple[int, float]]]:
    return [[(item.item_id, round(item.score or 0.0, 4)) for item in one.items] for one in found]


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
            found, prefill_s, seen = ray.get(replica.answer.remote(num_items))
            assert plain(found) == plain(expected)
            assert all(one.items for one in found)
            assert prefill_s > 0
            assert seen > 0
    finally:
        ray.kill(replica)
