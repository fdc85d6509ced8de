"""Payload of a search: parts that travel, and parts that were sent before."""

from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import pytest
import torch

from orchard.catalog.catalog import Catalog, from_codes
from orchard.catalog.view import CatalogView, view_of_leaves
from orchard.settings import VedConfig
from orchard.testing import TinySetup, tiny_setup
from rollout.engine.payload import CAPACITY, PayloadDecoder, PayloadEncoder
from rollout.engine.torch import TorchEngine
from rollout.item_filter import ItemFilter
from rollout.search.beam import beam
from rollout.search.sampling import dynamic
from rollout.search.ved.search import ved
from tests.fixtures.guides import random_guide
from tests.fixtures.values import critic_of


@pytest.fixture(scope="module")
def world() -> TinySetup:
    return tiny_setup()


def view(world: TinySetup, seed: int) -> CatalogView:
    trie = world.catalog.trie
    return view_of_leaves(
        trie, torch.from_numpy(np.random.default_rng(seed).random(trie.num_leaves)) < 0.7
    )


def allowed(world: TinySetup, seed: int) -> ItemFilter:
    count = len(world.prompts)
    return ItemFilter(
        view=view(world, seed),
        excluded=np.arange(count),
        excluded_start=np.arange(count + 1),
    )


def both() -> tuple[PayloadEncoder, PayloadDecoder]:
    return PayloadEncoder(), PayloadDecoder(torch.device("cpu"))


def test_a_search_finds_the_same_after_its_travel(world: TinySetup) -> None:
    engine = TorchEngine(world.model, world.tokenizer, world.version)
    sender, receiver = both()
    for seed in (0, 1, 0):
        find = partial(beam, width=6, allowed=allowed(world, seed))
        received = receiver.decode(sender.encode(find))
        assert received(engine, world.prompts).leaf.tolist() == (
            find(engine, world.prompts).leaf.tolist()
        )
    drawn = partial(dynamic, catalog=world.catalog, count=5, temperature=1.0, seed=3)
    received = receiver.decode(sender.encode(drawn))
    assert received(engine, world.prompts).leaf.tolist() == (
        drawn(engine, world.prompts).leaf.tolist()
    )


def test_views_and_catalogs_travel_once_by_content(world: TinySetup) -> None:
    sender, receiver = both()
    first = sender.encode(partial(beam, width=6, allowed=allowed(world, 0)))
    kept = receiver.decode(first)
    # Made again, with other exclusions: another object of the same content.
    again = replace(allowed(world, 0), excluded=np.arange(len(world.prompts)) + 1)
    second = sender.encode(partial(beam, width=9, allowed=again))
    assert len(first.new) == 1
    assert second.new == {}
    found = receiver.decode(second).keywords["allowed"]  # pyright: ignore
    assert found.view is kept.keywords["allowed"].view  # pyright: ignore
    assert found.excluded.tolist() == again.excluded.tolist()
    other = sender.encode(partial(beam, width=6, allowed=allowed(world, 1)))
    assert len(other.new) == 1
    drawn = partial(dynamic, catalog=world.catalog, count=5, temperature=1.0, seed=3)
    assert [len(sender.encode(drawn).new) for _ in range(2)] == [1, 0]


def test_what_is_kept_does_not_grow_with_what_is_sent() -> None:
    trie = from_codes([[code] for code in range(100_000)]).trie
    sender, receiver = both()
    views = [view_of_leaves(trie, torch.arange(trie.num_leaves) != i) for i in range(CAPACITY + 5)]
    empty, none = np.zeros(0, np.int64), np.zeros(2, np.int64)

    def send(one: CatalogView) -> int:
        limits = ItemFilter(view=one, excluded=empty, excluded_start=none)
        parcel = sender.encode(partial(beam, width=3, allowed=limits))
        assert len(parcel.search) < 1000
        receiver.decode(parcel)
        return len(parcel.new)

    assert [send(one) for one in views] == [1] * len(views)
    assert len(receiver._cached) == CAPACITY
    assert send(views[-CAPACITY]) == 0  # the one that was used longest ago and is still there
    assert send(views[0]) == 1
    assert send(views[-CAPACITY]) == 0
    assert len(receiver._cached) == CAPACITY


def test_a_guide_travels_once(world: TinySetup) -> None:
    sender, receiver = both()
    guide = random_guide(world.catalog, seed=1)
    find = partial(beam, width=3, guide=guide, prove=3)
    first, second = sender.encode(find), sender.encode(find)
    assert list(first.new) == [f"guide {guide.digest}"]
    assert not second.new
    receiver.decode(first)
    assert cast(Any, receiver.decode(second)).keywords["guide"].digest == guide.digest
    other = sender.encode(partial(beam, width=3, guide=replace(guide, seen_weight=9.0)))
    assert len(other.new) == 1


def test_views_differ_in_digest_where_they_differ_in_what_is_live(world: TinySetup) -> None:
    assert view(world, 0).digest == view(world, 0).digest != view(world, 1).digest
    assert replace(view(world, 0), catalog="other").digest != view(world, 0).digest


def test_a_critic_travels_to_a_worker_without_its_catalog() -> None:
    sender, critic = PayloadEncoder(), critic_of()
    find = partial(ved, settings=VedConfig(), count=6, seed=0, critic=critic)
    first, second = sender.encode(find), sender.encode(find)
    assert [type(one) for one in first.new.values()] == [Catalog]
    assert not second.new
    arrived = PayloadDecoder(torch.device("cpu"))
    arrived.decode(first)
    again = cast(Any, arrived.decode(second)).keywords["critic"]
    table, node = torch.tensor([[3, 4, -1]]), torch.tensor([[0, 1]])
    for here, there in zip(critic.eval()(table, node), again.eval()(table, node), strict=True):
        torch.testing.assert_close(here, there)
