"""Searches that may not find everything, against enumeration."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchard import ragged
from orchard.catalog.view import full_view, view_of_items, view_of_leaves
from orchard.errors import CatalogError
from orchard.policy import value_head
from orchard.settings import VedConfig
from orchard.testing import TinySetup, tiny_catalog, tiny_setup
from rollout.engine.torch import TorchEngine
from rollout.item_filter import ItemFilter
from rollout.search.beam import beam
from rollout.search.draws import sample
from rollout.search.gumbel import GumbelNoise
from rollout.search.sampling import beam_sample
from rollout.search.ved.search import ved

examples = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def drawn(world: TinySetup, seed: int) -> tuple[ItemFilter, list[set[int]]]:
    """A random view and exclusions of any severity, and the leaves that each prompt may find."""
    draw, trie = np.random.default_rng(seed), world.catalog.trie
    live = draw.random(trie.num_leaves) < draw.choice([0.1, 0.5, 1.0])
    lists = [
        draw.choice(trie.num_leaves, size=size)
        for size in draw.integers(0, 3 * trie.num_leaves, len(world.prompts)) * draw.integers(2)
    ]
    allowed = ItemFilter(
        view=view_of_leaves(trie, torch.from_numpy(live)),
        excluded=np.concatenate(lists).astype(np.int64),
        excluded_start=ragged.starts(np.array([len(one) for one in lists])),
    )
    return allowed, [set(np.flatnonzero(live).tolist()) - set(one.tolist()) for one in lists]


def slow_beam(world: TinySetup, prompt: int, leaves: set[int], width: int) -> list[int]:
    """The best prefixes of allowed leaves, depth by depth, each as likely as all leaves below."""
    logprob, beams = world.leaf_logprob[prompt], [()]
    for depth in range(1, world.catalog.trie.depth + 1):
        total = dict[tuple[int, ...], float]()
        for path, one in zip(world.leaf_path, logprob, strict=True):
            total[path[:depth]] = np.logaddexp(total.get(path[:depth], -np.inf), one)
        score = {
            world.leaf_path[leaf][:depth]: total[world.leaf_path[leaf][:depth]]
            for leaf in leaves
            if any(world.leaf_path[leaf][: len(b)] == b for b in beams)
        }
        beams = sorted(score, key=lambda prefix: -score[prefix])[:width]
    return [world.leaf_path.index(path) for path in beams]


@pytest.mark.slow
@examples
@given(seed=st.integers(0, 2**16), width=st.sampled_from([1, 3, 8, 100]))
def test_a_beam_finds_the_best_leaves_that_are_allowed(
    world: TinySetup, engine: TorchEngine, seed: int, width: int
) -> None:
    allowed, leaves = drawn(world, seed)
    found = beam(engine, world.prompts, width=width, allowed=allowed)
    assert found.count.tolist() == [min(width, len(one)) for one in leaves]
    for prompt, mine in enumerate(leaves):
        rows = slice(found.start[prompt], found.start[prompt + 1])
        assert found.leaf[rows].tolist() == slow_beam(world, prompt, mine, width)
        # Forbidding changes no log-probability.
        assert np.allclose(
            found.score[rows], world.leaf_logprob[prompt][found.leaf[rows]], atol=1e-5
        )


@pytest.mark.slow
@examples
@given(seed=st.integers(0, 2**16), temperature=st.sampled_from([0.3, 1.0, 3.0]))
def test_draws_are_allowed_leaves_with_the_policys_own_log_probability(
    world: TinySetup, engine: TorchEngine, seed: int, temperature: float
) -> None:
    allowed, leaves = drawn(world, seed)
    found = sample(
        engine, world.prompts, count=9, temperature=temperature, seed=seed, allowed=allowed
    )
    assert found.count.tolist() == [9 if one else 0 for one in leaves]
    for prompt, mine in enumerate(leaves):
        rows = slice(found.start[prompt], found.start[prompt + 1])
        assert set(found.leaf[rows].tolist()) <= mine
        assert np.allclose(
            found.score[rows], world.leaf_logprob[prompt][found.leaf[rows]], atol=1e-5
        )


@pytest.mark.slow
def test_draws_without_replacement_are_distinct_allowed_leaves(
    world: TinySetup, engine: TorchEngine
) -> None:
    for seed in range(8):
        allowed, leaves = drawn(world, seed)
        noise = GumbelNoise(world.prompts.id, temperature=1.0, seed=seed)
        found = beam(engine, world.prompts, width=5, noise=noise, allowed=allowed)
        assert found.count.tolist() == [min(5, len(one)) for one in leaves]
        for prompt, mine in enumerate(leaves):
            rows = found.leaf[found.start[prompt] : found.start[prompt + 1]].tolist()
            assert len(set(rows)) == len(rows)
            assert set(rows) <= mine


def test_draws_follow_the_policy_among_the_codes_that_are_allowed(
    world: TinySetup, engine: TorchEngine
) -> None:
    trie, one = world.catalog.trie, world.prompts.select(np.array([1]))
    live = torch.arange(trie.num_leaves) % 3 > 0
    allowed = ItemFilter(
        view=view_of_leaves(trie, live),
        excluded=np.zeros(0, np.int64),
        excluded_start=np.zeros(2, int),
    )
    found = sample(engine, one, count=20_000, temperature=1.0, seed=0, allowed=allowed)
    first = trie.path(trie.leaf_node)[:, 0].numpy()
    mass = np.bincount(first, weights=np.exp(world.leaf_logprob[1]))
    mass[np.setdiff1d(first, first[live.numpy()])] = 0  # whole branches only, not their shares
    seen = np.bincount(found.node[:, 0], minlength=len(mass)) / 20_000
    assert np.allclose(seen, mass / mass.sum(), atol=0.02)


def test_a_view_of_everything_forbids_nothing(world: TinySetup, engine: TorchEngine) -> None:
    allowed = ItemFilter(
        view=full_view(world.catalog.trie),
        excluded=np.zeros(0, np.int64),
        excluded_start=np.zeros(len(world.prompts) + 1, np.int64),
    )
    free = beam(engine, world.prompts, width=7)
    viewed = beam(engine, world.prompts, width=7, allowed=allowed)
    assert viewed.leaf.tolist() == free.leaf.tolist()
    assert np.array_equal(viewed.logprob, free.logprob)
    drawn_free = sample(engine, world.prompts, count=5, temperature=1.0, seed=3)
    drawn_viewed = sample(engine, world.prompts, count=5, temperature=1.0, seed=3, allowed=allowed)
    assert drawn_viewed.leaf.tolist() == drawn_free.leaf.tolist()


def test_where_all_is_excluded_nothing_is_found_and_the_rest_is_as_before(
    world: TinySetup, engine: TorchEngine
) -> None:
    trie = world.catalog.trie
    excluded = np.arange(trie.num_leaves)
    none_for_two = np.array([0, 0, 0, len(excluded), len(excluded)])
    allowed = ItemFilter(view=full_view(trie), excluded=excluded, excluded_start=none_for_two)
    found = beam(engine, world.prompts, width=4, allowed=allowed)
    assert found.count.tolist() == [4 * (prompt != 2) for prompt in range(4)]
    others = beam(engine, world.prompts, width=4).select(np.array([0, 1, 3]))
    assert found.select(np.array([0, 1, 3])).leaf.tolist() == others.leaf.tolist()
    nothing = replace(allowed, view=view_of_items(world.catalog, np.zeros(30, bool)))
    assert beam(engine, world.prompts, width=4, allowed=nothing).count.tolist() == [0] * 4
    drawn_none = sample(engine, world.prompts, count=3, temperature=1.0, seed=0, allowed=nothing)
    assert drawn_none.count.tolist() == [0] * 4


def test_what_belongs_to_another_catalog_or_batch_is_refused(
    world: TinySetup, engine: TorchEngine
) -> None:
    trie = world.catalog.trie
    empty, none = np.zeros(0, np.int64), np.zeros(5, np.int64)
    strange = full_view(tiny_catalog(seed=9).trie)
    stranger = ItemFilter(view=strange, excluded=empty, excluded_start=none)
    with pytest.raises(CatalogError, match="the view was made for catalog .* make the view"):
        beam(engine, world.prompts, width=2, allowed=stranger)
    fit = replace(stranger, view=full_view(trie))
    with pytest.raises(CatalogError, match="excluded for 3 prompts, the batch has 4"):
        beam(engine, world.prompts, width=2, allowed=replace(fit, excluded_start=none[:4]))
    beyond = replace(
        fit, excluded=np.array([trie.num_leaves]), excluded_start=np.array([0, 1, 1, 1, 1])
    )
    with pytest.raises(CatalogError, match=f"leaf {trie.num_leaves} is excluded"):
        sample(engine, world.prompts, count=2, temperature=1.0, seed=0, allowed=beyond)


@pytest.mark.slow
@examples
@given(seed=st.integers(0, 2**16), width=st.sampled_from([1, 3, 100]))
def test_distinct_draws_are_of_the_allowed_leaves(
    world: TinySetup, engine: TorchEngine, seed: int, width: int
) -> None:
    allowed, leaves = drawn(world, seed)
    found = beam_sample(
        engine, world.prompts, width=width, temperature=1.0, seed=seed, allowed=allowed
    )
    assert found.count.tolist() == [min(width, len(one)) for one in leaves]
    for prompt, mine in enumerate(leaves):
        rows = slice(found.start[prompt], found.start[prompt + 1])
        assert len(set(found.leaf[rows].tolist())) == found.count[prompt]
        assert set(found.leaf[rows].tolist()) <= mine


@cache
def with_values(seed: int) -> TinySetup:
    """A world whose policy has a value head."""
    world = tiny_setup(level_size=(4, 4, 5), num_items=40)
    value_head.attach(world.model, seed=seed)
    return world


@pytest.mark.slow
@settings(max_examples=10)
@given(seed=st.integers(0, 2**16), budget=st.sampled_from([20, 80]))
def test_a_guided_search_visits_allowed_leaves_only(seed: int, budget: int) -> None:
    guided = with_values(seed % 3)
    engine = TorchEngine(guided.model, guided.tokenizer, guided.version)
    allowed, leaves = drawn(guided, seed)
    ways = VedConfig(budget=budget, width=4)
    found = ved(engine, guided.prompts, ways, count=30, seed=seed, allowed=allowed)
    for prompt, mine in enumerate(leaves):
        rows = slice(found.start[prompt], found.start[prompt + 1])
        assert set(found.leaf[rows].tolist()) <= mine
        assert found.count[prompt] >= min(4, len(mine))  # what its beam finds
