"""The search and ordinary generation in one vLLM engine, in a process of its own."""

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from orchard.catalog.view import view_of_leaves
from orchard.errors import EngineError
from orchard.policy import value_head, weights
from orchard.settings import RolloutConfig, VedConfig
from orchard.testing import TinySetup, tiny_setup
from orchard.types import PolicyVersion
from rollout.candidates import Candidates
from rollout.engine.torch import TorchEngine
from rollout.engine.vllm import VllmEngine
from rollout.item_filter import ItemFilter
from rollout.search.beam import beam
from rollout.search.guided import wider_unless_proved
from rollout.search.ved.search import ved
from tests.fixtures.guides import random_guide

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow]


class Owner:
    """An engine, and what its owner may ask of it."""

    def __init__(self, world: TinySetup, folder: Path, dtype: str, kv_cache_gib: float) -> None:
        config = RolloutConfig(dtype=dtype, threads=1, kv_cache_gib=kv_cache_gib)
        vocabulary = world.tokenizer
        self._world = world
        self._engine = VllmEngine(folder, world.model, vocabulary, world.version, config, seed=0)

    def search(self, width: int) -> tuple[Candidates, int]:
        """Return the candidates, and how many prompts are searched at a time."""
        found = self._engine.run(partial(beam, width=width), self._world.prompts)
        return found, self._engine.llm.collective_rpc(lambda worker: worker.orchard_batch)[0]

    def find(self, find: Any) -> Candidates:
        """Return the candidates of any search."""
        return self._engine.run(find, self._world.prompts)

    def load_weights(self, version: PolicyVersion, new: weights.Weights) -> None:
        """Search with other weights."""
        self._engine.load_weights(version, new)

    def generate(self) -> list[list[int]]:
        """Greedy text after each prompt."""
        from vllm import SamplingParams

        prompts, params = self._world.prompts, SamplingParams(max_tokens=20, temperature=0.0)
        tokens = np.split(prompts.token, prompts.token_start[1:-1])
        answers = self._engine.llm.generate(
            [{"prompt_token_ids": t.tolist()} for t in tokens], params, use_tqdm=False
        )
        return [list(answer.outputs[0].token_ids) for answer in answers]

    def search_amid_requests(self) -> None:
        """Leave a request unfinished, search, and withdraw it again."""
        from vllm import SamplingParams

        engine = self._engine.llm.llm_engine
        engine.add_request("1", {"prompt_token_ids": [3, 4]}, SamplingParams(max_tokens=5))
        try:
            self.search(2)
        finally:
            engine.abort_request(["1"])
            while engine.has_unfinished_requests():
                engine.step()


@pytest.fixture(scope="module")
def world() -> TinySetup:
    world = tiny_setup(lengths=(0, 12, 3, 15, 10, 7), num_items=200, level_size=(9, 8, 7))
    value_head.attach(world.model, seed=0)
    for parameter in world.model.get_submodule(value_head.NAME).parameters():
        parameter.data.normal_(0.0, 0.3)
    return world


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def owner(
    request: pytest.FixtureRequest,
    ray_cluster: None,
    world: TinySetup,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Any, str]]:
    folder = world.save(tmp_path_factory.mktemp("policy"))
    # A cache that the six prompts' searches outgrow.
    gib = 0.002 if request.param == "float32" else 0.001
    handle = ray.remote(Owner).options(num_cpus=1).remote(world, folder, request.param, gib)
    yield handle, request.param
    ray.kill(handle)


def test_searches_and_generation_take_turns(owner: tuple[Any, str], world: TinySetup) -> None:
    handle, dtype = owner
    reference = TorchEngine(world.model, world.tokenizer, world.version)
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


def guided(
    reference: TorchEngine, handle: Any, world: TinySetup, *, tolerance: float
) -> np.ndarray:
    """The values of a guided search, the same in the worker as in the reference engine."""
    find = partial(ved, settings=VedConfig(budget=33, width=4), count=12, seed=5)
    found: Candidates = ray.get(handle.find.remote(find))
    expected = find(reference, world.prompts)
    assert found.value is not None
    assert expected.value is not None
    if tolerance < 1e-4:
        assert found.start.tolist() == expected.start.tolist()
        assert np.array_equal(found.node, expected.node)
        np.testing.assert_allclose(found.logprob, expected.logprob, atol=tolerance)
        np.testing.assert_allclose(found.value, expected.value, atol=tolerance)
        assert found.cost.counts == expected.cost.counts
    assert np.diff(found.start).tolist() == [12] * len(world.prompts)
    return expected.value


def test_guided_searches_follow_the_weights_that_were_pushed(
    owner: tuple[Any, str], world: TinySetup
) -> None:
    handle, dtype = owner
    tolerance = 1e-5 if dtype == "float32" else 1.0
    model = copy.deepcopy(world.model)
    reference = TorchEngine(model, world.tokenizer, world.version)
    first = weights.snapshot(world.model)
    before = guided(reference, handle, world, tolerance=tolerance)
    new = {name: part[::-1].copy() for name, part in first.items()}
    plain = {name: part for name, part in first.items() if not name.startswith(value_head.NAME)}
    for step, content in enumerate((new, plain, first), 1):
        version = PolicyVersion(step=step, digest=weights.digest(content))
        ray.get(handle.load_weights.remote(version, content))
        reference.load_weights(version, content)
        if content is plain:
            with pytest.raises(EngineError, match="has no head for them"):
                guided(reference, handle, world, tolerance=tolerance)
            continue
        after = guided(reference, handle, world, tolerance=tolerance)
        assert (np.nanmean(after) == np.nanmean(before)) == (content is first)


def test_a_view_and_exclusions_hold_in_the_worker(owner: tuple[Any, str], world: TinySetup) -> None:
    handle, dtype = owner
    trie, count = world.catalog.trie, len(world.prompts)
    reference = TorchEngine(world.model, world.tokenizer, world.version)
    for every in (2, 3, 2):
        live = torch.arange(trie.num_leaves) % every > 0
        allowed = ItemFilter(
            view=view_of_leaves(trie, live),
            excluded=np.tile(np.arange(10), count),
            excluded_start=np.arange(count + 1) * 10,
        )
        find = partial(beam, width=20, allowed=allowed)
        found: Candidates = ray.get(handle.find.remote(find))
        assert np.diff(found.start).tolist() == [20] * count
        assert live.numpy()[found.leaf].all()
        assert found.leaf.min() >= 10
        if dtype == "float32":
            assert found.leaf.tolist() == find(reference, world.prompts).leaf.tolist()


def test_guided_beams_of_the_worker_are_those_of_the_reference(
    owner: tuple[Any, str], world: TinySetup
) -> None:
    handle, dtype = owner
    reference = TorchEngine(world.model, world.tokenizer, world.version)
    guide, trie, count = random_guide(world.catalog, seed=4), world.catalog.trie, 6
    allowed = ItemFilter(
        view=view_of_leaves(trie, torch.arange(trie.num_leaves) % 3 > 0),
        excluded=np.tile(np.arange(10), count),
        excluded_start=np.arange(count + 1) * 10,
    )
    searches = (
        partial(beam, width=20, guide=guide, prove=5),
        partial(beam, width=20, guide=guide, prove=5, count=5, allowed=allowed),
        partial(wider_unless_proved, width=6, wide=60, prove=5, guide=guide, allowed=allowed),
        partial(beam, width=12, head=True),
        partial(beam, width=12, head=True, guide=guide),
    )
    for search in searches:
        for _ in range(2):  # the second time the guide is in the worker's cache
            found: Candidates = ray.get(handle.find.remote(search))
        expected = search(reference, world.prompts)
        assert np.diff(found.start).tolist() == np.diff(expected.start).tolist()
        if dtype == "float32":
            assert np.array_equal(found.node, expected.node)
            assert np.allclose(found.score, expected.score, atol=1e-5)
            assert (found.proved is None) == (expected.proved is None)
            if found.proved is not None and expected.proved is not None:
                assert found.proved.tolist() == expected.proved.tolist()


def test_values_by_requests_are_refused_before_vllm_starts(
    world: TinySetup, tmp_path: Path
) -> None:
    config = RolloutConfig(decode="requests")
    vocabulary = world.tokenizer
    with pytest.raises(EngineError, match=r'search in the worker \(rollout.decode = "worker"\)'):
        VllmEngine(tmp_path, world.model, vocabulary, world.version, config, seed=0)


def test_a_search_amid_requests_is_refused(owner: tuple[Any, str]) -> None:
    handle, _ = owner
    with pytest.raises(EngineError, match="vLLM is generating"):
        ray.get(handle.search_amid_requests.remote())
    ray.get(handle.search.remote(2))
