"""The paged engine on a model whose pages hold tokens, against the reference engine."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from orchard.catalog.view import full_view, view_of_leaves
from orchard.errors import EngineError
from orchard.policy import value_head
from orchard.policy.model import head_weight
from orchard.policy.value_head import ValueHead
from orchard.settings import VedConfig
from orchard.testing import TinySetup, tiny_setup, tiny_title_setup
from rollout.candidates import Candidates
from rollout.engine.paged import CacheFullError, ForwardBatch, PagedBackend
from rollout.engine.payload import PayloadDecoder, PayloadEncoder
from rollout.engine.torch import TorchEngine
from rollout.engine.worker import SearchExtension, missing
from rollout.item_filter import ItemFilter
from rollout.search.beam import beam
from rollout.search.draws import sample
from rollout.search.ved.search import ved


class TokenPages:
    """Keeps tokens where a real cache keeps keys and values, and reads each prefix from there."""

    def __init__(
        self, world: TinySetup, *, page_size: int, num_pages: int, max_tokens: int, max_spans: int
    ) -> None:
        self.page_size, self.num_pages, self.max_length = page_size, num_pages, 4096
        self.max_tokens, self.max_spans = max_tokens, max_spans
        self.cache = torch.full((num_pages * page_size,), -1)
        self.model, self.passes = world.model, 0

    def forward(self, work: ForwardBatch) -> Tensor:
        assert len(work.token) <= self.max_tokens
        assert len(work.length) <= self.max_spans
        assert (work.start.diff() > 0).all()
        assert (work.slot >= self.page_size).all()  # page 0 is nobody's
        self.cache[work.slot] = work.token
        self.passes += 1
        hidden: list[Tensor] = []
        for pages, length, new in zip(work.pages, work.length, work.start.diff(), strict=True):
            place = torch.arange(int(length))
            slot = pages[place // self.page_size].long() * self.page_size + place % self.page_size
            prefix = self.cache[slot]
            assert (prefix >= 0).all()
            last = self.model.base_model(input_ids=prefix[None]).last_hidden_state[0]
            hidden.append(last[-int(new) :])
        assert work.position.tolist() == [
            int(length) - int(new) + i
            for length, new in zip(work.length, work.start.diff(), strict=True)
            for i in range(int(new))
        ]
        return torch.cat(hidden)

    def copy_pages(self, source: Tensor, target: Tensor) -> None:
        assert not set(source.tolist()) & set(target.tolist())
        pages = self.cache.view(self.num_pages, self.page_size)
        pages[target] = pages[source]


def paged(world: TinySetup, **options: int) -> PagedBackend:
    bounds = {"page_size": 4, "num_pages": 2000, "max_tokens": 512, "max_spans": 512} | options
    return PagedBackend(
        TokenPages(world, **bounds),
        world.tokenizer,
        world.version,
        head_weight(world.model).detach(),
        value_head.value_head_of(world.model),
    )


def assert_same(ours: Candidates, reference: Candidates) -> None:
    assert ours.start.tolist() == reference.start.tolist()
    assert np.array_equal(ours.node, reference.node)
    assert np.allclose(ours.logprob, reference.logprob, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("page_size", [1, 4, 64])
@pytest.mark.parametrize("bounds", [{}, {"max_tokens": 3}, {"max_spans": 2}])
def test_searches_are_those_of_the_reference(
    world: TinySetup, engine: TorchEngine, page_size: int, bounds: dict[str, int]
) -> None:
    ours = paged(world, page_size=page_size, **bounds)
    for width in (1, 5):
        assert_same(
            beam(ours, world.prompts, width=width), beam(engine, world.prompts, width=width)
        )
    assert_same(
        sample(ours, world.prompts, count=6, temperature=1.0, seed=2),
        sample(engine, world.prompts, count=6, temperature=1.0, seed=2),
    )


def test_a_state_may_be_extended_again_after_its_children() -> None:
    world = tiny_setup()
    ours, trie = paged(world, page_size=64), world.catalog.trie
    root = ours.prefill(world.prompts.select(np.array([0])))
    node = root.children.node[:1]
    token, one = world.tokenizer.token_of(node), torch.tensor([0, 1])
    first = ours.extend(root.state, token, one, node)
    deeper = trie.children(node).node[:1]
    ours.extend(first.state, world.tokenizer.token_of(deeper), one, deeper)
    again = ours.extend(root.state, token, one, node)
    assert torch.equal(first.logprob, again.logprob)


def guided(world: TinySetup, *, scale: float = 0.3) -> ValueHead:
    """Give the world's policy a value head with something to say."""
    value_head.attach(world.model, seed=0)
    head = value_head.value_head_of(world.model)
    assert head is not None
    for parameter in head.parameters():
        parameter.data.normal_(0.0, scale)
    return head


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "settings"),
    [
        (tiny_setup(lengths=(0, 3, 1, 7)), VedConfig(budget=20, width=3)),
        (
            tiny_setup(level_size=(3, 2, 2, 3), varying_depth=True, seed=4),
            VedConfig(budget=25, width=2, to_leaf=True, traversals=2),
        ),
        (tiny_title_setup(["tea", "tea pot", "toy", "a cup"]), VedConfig(budget=30, width=2)),
    ],
    ids=["level", "varying", "titles"],
)
@pytest.mark.parametrize("page_size", [2, 64])
def test_guided_searches_are_those_of_the_reference(
    world: TinySetup, settings: VedConfig, page_size: int
) -> None:
    guided(world)
    reference = TorchEngine(world.model, world.tokenizer, world.version)
    find = partial(ved, settings=settings, count=4, seed=2)
    ours = find(paged(world, page_size=page_size, max_tokens=9), world.prompts)
    expected = find(reference, world.prompts)
    assert_same(ours, expected)
    assert ours.value is not None
    assert expected.value is not None
    assert np.nanstd(expected.value) > 0.01
    np.testing.assert_allclose(ours.value, expected.value, atol=1e-5)
    assert ours.cost.counts == expected.cost.counts
    assert ours.cost.passes == expected.cost.passes


def test_another_value_head_gives_other_values_and_none_gives_none() -> None:
    world = tiny_setup()
    first, second = guided(world), guided(tiny_setup(), scale=0.5)
    ours, head = paged(world), head_weight(world.model).detach()
    prefill = ours.prefill(world.prompts)
    assert prefill.value is not None
    ours.load_weights(world.version, head, second)
    new = ours.prefill(world.prompts)
    assert new.value is not None
    assert (new.value - prefill.value).abs().max() > 0.01
    ours.load_weights(world.version, head)
    assert ours.prefill(world.prompts).value is None
    ours.load_weights(world.version, head, first)
    again = ours.prefill(world.prompts).value
    assert again is not None
    assert torch.equal(again, prefill.value)


class Worker(SearchExtension):
    """The worker's methods around an engine of the test's choice."""

    def __init__(self, engine: PagedBackend) -> None:
        self.orchard_engine, self.orchard_batch = engine, 1 << 31
        self.orchard_parcels, self.sender = PayloadDecoder(torch.device("cpu")), PayloadEncoder()

    def run(self, find: Any, prompts: Any) -> Candidates:
        return self.orchard_run(self.sender.encode(find), prompts)


def used(engine: PagedBackend, find: Any, prompts: Any) -> int:
    """Pages that a search takes."""
    find(engine, prompts)
    return engine._used


@pytest.mark.slow
def test_batches_that_do_not_fit_are_split(
    world: TinySetup, engine: TorchEngine, caplog: pytest.LogCaptureFixture
) -> None:
    find = partial(beam, width=5)
    whole = find(engine, world.prompts)
    # Room for the largest search of one prompt, and not for all of them.
    roomy = paged(world)
    alone = [np.array([row]) for row in range(len(world.prompts))]
    pages = max(used(roomy, find, world.prompts.select(row)) for row in alone)
    assert pages < used(roomy, find, world.prompts)
    worker = Worker(paged(world, num_pages=pages))
    for _ in range(2):
        assert_same(worker.run(find, world.prompts), whole)
    assert worker.orchard_batch < len(world.prompts)
    assert "raise rollout.kv_cache_gib" in caplog.text


@pytest.mark.slow
def test_what_prompts_may_find_is_split_with_their_batch() -> None:
    world = tiny_setup(num_items=60)
    trie, count = world.catalog.trie, len(world.prompts)
    allowed = ItemFilter(
        view=view_of_leaves(trie, torch.arange(trie.num_leaves) % 4 > 0),
        excluded=np.arange(count * 5),
        excluded_start=np.array([0, 3, 3, 10, count * 5]),
    )
    find = partial(beam, width=5, allowed=allowed)
    whole, roomy = find(paged(world), world.prompts), paged(world)
    pages = max(used(roomy, partial(beam, width=9), world.prompts.select(np.array([row])))
                for row in range(count))  # fmt: skip
    worker = Worker(paged(world, num_pages=pages))
    for _ in range(2):
        assert_same(worker.run(find, world.prompts), whole)
    assert worker.orchard_batch < count


def test_a_prompt_that_cannot_fit_is_an_error() -> None:
    world = tiny_setup()
    worker = Worker(paged(world, num_pages=3))
    with pytest.raises(EngineError, match=r"more than 3 pages .* raise rollout.kv_cache_gib"):
        worker.run(partial(beam, width=5), world.prompts)
    with pytest.raises(CacheFullError, match="3 there"):
        paged(world, num_pages=3).prefill(world.prompts)


def test_a_prompt_too_long_and_exclusions_of_everything_are_answered_at_once() -> None:
    world = tiny_setup()
    ours, trie, count = paged(world), world.catalog.trie, len(world.prompts)
    limit = ours._model.max_length = int(np.diff(world.prompts.token_start).max()) + trie.depth - 1
    with pytest.raises(EngineError, match=f"exceed the policy's {limit} positions"):
        ours.prefill(world.prompts)
    ours = paged(world)
    allowed = ItemFilter(
        view=full_view(trie),
        excluded=np.tile(np.arange(trie.num_leaves), count),
        excluded_start=np.arange(count + 1) * trie.num_leaves,
    )
    found = Worker(ours).run(partial(beam, width=5, allowed=allowed), world.prompts)
    assert found.count.tolist() == [0] * count


class Config:
    """A model runner's parts, as far as they are looked at."""

    def __init__(self, **parts: Any) -> None:
        self.__dict__.update(parts)


def test_a_worker_without_the_parts_says_which() -> None:
    assert missing(Config(model=1, vllm_config=1)) == (
        "its model runner has no attn_groups, kv_cache_config, kv_caches"
    )
    parts = {"model": 1, "attn_groups": [], "kv_caches": []}
    groups = Config(kv_cache_groups=[Config(kv_cache_spec=1), Config(kv_cache_spec="")])
    runner = Config(vllm_config=1, kv_cache_config=groups, **parts)
    assert missing(runner) == "the policy's cache is 2 groups of int, str"
    spec = type("FullAttentionSpec", (), {})()
    whole = Config(kv_cache_groups=[Config(kv_cache_spec=spec)])
    for split, answer in (
        ({"tensor_parallel_size": 4}, ""),
        ({"pipeline_parallel_size": 2}, "vLLM runs with pipeline_parallel_size above 1"),
        (
            {"decode_context_parallel_size": 2},
            "vLLM runs with decode_context_parallel_size above 1",
        ),
    ):
        cut = Config(parallel_config=Config(**split))
        runner = Config(vllm_config=cut, kv_cache_config=whole, **parts)
        assert missing(runner) == answer
