"""The search and ordinary generation in one vLLM engine, in a process of its own."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from orchard.config import RolloutConfig
from orchard.errors import EngineError
from orchard.testing import World, tiny_world
from rollout.candidates import Candidates
from rollout.engine.torch import TorchEngine
from rollout.engine.vllm import VllmHolder
from rollout.search import beam

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow]


class Owner:
    """An engine, and what its owner may ask of it."""

    def __init__(self, world: World, folder: Path, dtype: str, kv_cache_gib: float) -> None:
        config = RolloutConfig(dtype=dtype, threads=1, kv_cache_gib=kv_cache_gib)
        trie, vocabulary = world.catalogue.trie, world.vocabulary
        self._world = world
        self._holder = VllmHolder(
            folder, world.model, trie, vocabulary, world.version, config, seed=0
        )

    def search(self, width: int) -> tuple[Candidates, int]:
        """What is found, and how many prompts are searched at a time."""
        found = self._holder.run(partial(beam, width=width), self._world.prompts)
        return found, self._holder.llm.collective_rpc(lambda worker: worker.orchard_batch)[0]

    def generate(self) -> list[list[int]]:
        """Greedy text after each prompt."""
        from vllm import SamplingParams

        prompts, params = self._world.prompts, SamplingParams(max_tokens=20, temperature=0.0)
        tokens = np.split(prompts.token, prompts.token_start[1:-1])
        answers = self._holder.llm.generate(
            [{"prompt_token_ids": t.tolist()} for t in tokens], params, use_tqdm=False
        )
        return [list(answer.outputs[0].token_ids) for answer in answers]

    def search_amid_requests(self) -> None:
        """Leave a request unfinished, search, and withdraw it again."""
        from vllm import SamplingParams

        engine = self._holder.llm.llm_engine
        engine.add_request("1", {"prompt_token_ids": [3, 4]}, SamplingParams(max_tokens=5))
        try:
            self.search(2)
        finally:
            engine.abort_request(["1"])
            while engine.has_unfinished_requests():
                engine.step()


@pytest.fixture(scope="module")
def world() -> World:
    return tiny_world(lengths=(0, 12, 3, 15, 10, 7), num_items=200, level_size=(9, 8, 7))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def owner(
    request: pytest.FixtureRequest,
    ray_cluster: None,
    world: World,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Any, str]]:
    folder = world.save(tmp_path_factory.mktemp("policy"))
    # A cache that the six prompts' searches outgrow.
    gib = 0.002 if request.param == "float32" else 0.001
    handle = ray.remote(Owner).options(num_cpus=1).remote(world, folder, request.param, gib)
    yield handle, request.param
    ray.kill(handle)


def test_searches_and_generation_take_turns(owner: tuple[Any, str], world: World) -> None:
    handle, dtype = owner
    reference = TorchEngine(world.model, world.catalogue.trie, world.vocabulary, world.version)
    text = ray.get(handle.generate.remote())
    for width in (40, 3):
        found, at_a_time = ray.get(handle.search.remote(width))
        assert at_a_time < len(world.prompts)
        expected = beam(reference, world.prompts, width=width)
        assert np.diff(found.start).tolist() == [width] * len(world.prompts)
        if dtype == "float32":
            assert np.array_equal(found.node, expected.node)
            assert np.allclose(found.logprob, expected.logprob, atol=1e-5)
        else:
            assert np.allclose(found.score, expected.score, atol=0.1)
        assert ray.get(handle.generate.remote()) == text


def test_a_search_amid_requests_is_refused(owner: tuple[Any, str]) -> None:
    handle, _ = owner
    with pytest.raises(EngineError, match="vLLM is generating"):
        ray.get(handle.search_amid_requests.remote())
    ray.get(handle.search.remote(2))
