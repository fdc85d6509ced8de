"""Guided beams against enumeration: keys, proofs, early stop, exclusion, width on demand."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchard import ragged
from orchard.catalog.view import full_view, view_of_items
from orchard.errors import CatalogError
from orchard.guide import fit
from orchard.guide.guide import Guide
from orchard.testing import TinySetup, tiny_setup
from rollout.candidates import Candidates
from rollout.engine.protocol import NextCodeLogprobs
from rollout.engine.torch import TorchEngine
from rollout.item_filter import ItemFilter
from rollout.search.beam import beam
from rollout.search.guided import wider_unless_proved, without_history
from tests.fixtures.guides import random_guide


def keys_of_leaves(world: TinySetup, guide: Guide) -> np.ndarray:
    leaves, prompts = world.catalog.trie.num_leaves, len(world.prompts)
    prompt, leaf = np.repeat(np.arange(prompts), leaves), np.tile(np.arange(leaves), prompts)
    reward = guide.reward(world.prompts, prompt, leaf).reshape(prompts, leaves)
    return np.stack(world.leaf_logprob) + reward


def keys_of(candidates: Candidates, guide: Guide, world: TinySetup) -> np.ndarray:
    prompt = ragged.row_of(candidates.start)
    return candidates.score + guide.reward(world.prompts, prompt, candidates.leaf)


WORLDS = [
    tiny_setup(seed=0),
    tiny_setup(varying_depth=True, seed=1),
    tiny_setup(varying_depth=True, level_size=(3, 2, 2, 3), seed=4),
]


@pytest.mark.slow
@settings(max_examples=40)
@given(
    index=st.integers(0, len(WORLDS) - 1),
    seed=st.integers(0, 1000),
    strength=st.sampled_from([0.05, 1.0, 4.0]),
    width=st.integers(1, 30),
    prove=st.integers(1, 12),
)
def test_where_it_is_proved_the_first_are_the_best_of_the_catalog(
    index: int, seed: int, strength: float, width: int, prove: int
) -> None:
    world = WORLDS[index]
    guide = random_guide(world.catalog, seed=seed)
    weight = [*(t.weight for t in guide.terms), guide.popularity_weight, guide.seen_weight]
    guide = fit.with_weights(guide, [w * strength for w in weight])
    engine = TorchEngine(world.model, world.tokenizer, world.version)
    found = beam(engine, world.prompts, width=width, guide=guide, prove=prove)
    assert found.proved is not None
    best = -np.sort(-keys_of_leaves(world, guide), 1)
    keys = keys_of(found, guide, world)
    first = min(prove, width)
    for prompt in range(len(world.prompts)):
        got = keys[found.start[prompt] : found.start[prompt + 1]]
        assert (np.diff(got) <= 1e-5).all()
        if found.proved[prompt]:
            size = min(first, len(best[prompt]))
            assert np.allclose(got[:size], best[prompt, :size], atol=1e-4)
    # Scores and log-probabilities are those of the policy.
    prompt = ragged.row_of(found.start)
    own = np.stack(world.leaf_logprob)[prompt, found.leaf]
    assert np.allclose(found.score, own, atol=1e-4)
    assert np.allclose(found.logprob.sum(1), own, atol=1e-4)


@pytest.mark.parametrize("width", [1, 4, 9, 100])
def test_a_guide_of_zeros_changes_no_bit(world: TinySetup, engine: TorchEngine, width: int) -> None:
    guide = random_guide(world.catalog, seed=0)
    zeros = fit.with_weights(guide, [0.0] * (len(guide.terms) + 2))
    plain = beam(engine, world.prompts, width=width)
    guided = beam(engine, world.prompts, width=width, guide=zeros, prove=10)
    for name in ("start", "node", "logprob", "score", "leaf"):
        assert np.array_equal(getattr(plain, name), getattr(guided, name))
    assert plain.proved is None
    assert plain.cost.forward_tokens == guided.cost.forward_tokens


def test_a_prompt_that_no_expert_knows_is_searched_plainly(
    world: TinySetup, engine: TorchEngine
) -> None:
    guide = random_guide(world.catalog, seed=0)
    assert world.prompts.history_start[1] == 0  # the first history is empty
    assert guide.popularity_weight != 0
    plain, guided = (beam(engine, world.prompts, width=5, guide=g) for g in (None, guide))
    rows = slice(0, plain.start[1])
    assert np.array_equal(plain.leaf[rows], guided.leaf[rows])
    assert np.array_equal(plain.score[rows], guided.score[rows])


@pytest.mark.parametrize("count", [1, 3, 6])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("filtered", [False, True])
def test_stopping_early_keeps_the_list_and_spares_tokens(
    world: TinySetup, engine: TorchEngine, count: int, guided: bool, filtered: bool
) -> None:
    guide = random_guide(world.catalog, seed=7) if guided else None
    allowed = some_leaves(world, seed=count) if filtered else None
    search = partial(beam, engine, world.prompts, guide=guide, allowed=allowed, prove=count)
    for width in (12, tuple(range(8, 8 + world.catalog.trie.depth))):
        whole, early = search(width=width), search(width=width, count=count)
        for prompt in range(len(world.prompts)):
            first = whole.leaf[whole.start[prompt] : whole.start[prompt + 1]][:count]
            mine = early.leaf[early.start[prompt] : early.start[prompt + 1]]
            assert mine.tolist() == first.tolist()
        assert whole.proved is not None
        assert early.proved is not None
        assert early.proved.tolist() == whole.proved.tolist()
        assert early.cost.forward_tokens <= whole.cost.forward_tokens


def some_leaves(world: TinySetup, *, seed: int) -> ItemFilter:
    draw, num_prompts = np.random.default_rng(seed), len(world.prompts)
    excluded = draw.integers(world.catalog.trie.num_leaves, size=(num_prompts, 5))
    return ItemFilter(
        view=view_of_items(world.catalog, draw.random(len(world.catalog)) < 0.8),
        excluded=excluded.reshape(-1), excluded_start=np.arange(num_prompts + 1) * 5,
    )  # fmt: skip


def test_stopping_early_spares_tokens_where_the_policy_is_sure() -> None:
    world = tiny_setup(level_size=(8, 8, 8), num_items=300, lengths=(3, 2, 5, 4))
    engine = TorchEngine(world.model, world.tokenizer, world.version)
    whole = beam(engine, world.prompts, width=40)
    early = beam(engine, world.prompts, width=40, count=3)
    assert early.cost.forward_tokens < whole.cost.forward_tokens
    assert early.cost.passes <= whole.cost.passes + 1


@pytest.mark.parametrize("filtered", [False, True])
def test_a_prefix_that_cannot_win_is_dropped_at_its_own_level(filtered: bool) -> None:
    world = tiny_setup(level_size=(12, 6, 4), num_items=60, lengths=(3, 2, 5))
    for parameter in world.model.parameters():
        parameter.data *= 3  # sure of itself
    engine = TorchEngine(world.model, world.tokenizer, world.version)
    allowed = some_leaves(world, seed=2) if filtered else None
    search = partial(beam, engine, world.prompts, width=60, allowed=allowed)
    whole, early = search(), search(count=1)
    forwarded = Watch(engine)
    beam(forwarded, world.prompts, width=60, count=1, allowed=allowed)
    level = world.catalog.trie.depth_of(torch.cat(forwarded.nodes))
    first = (world.catalog.trie.depth_of(torch.arange(world.catalog.trie.num_inner)) == 1).sum()
    assert int((level == 1).sum()) < len(world.prompts) * int(first)
    best = whole.leaf[whole.start[:-1]]
    assert early.leaf.tolist() == best.tolist()


class Watch:
    """Engine that notes the nodes of all frontiers but the root."""

    def __init__(self, engine: TorchEngine) -> None:
        self.trie, self.tokenizer, self.version = engine.trie, engine.tokenizer, engine.version
        self.prefill, self._engine = engine.prefill, engine
        self.nodes: list[torch.Tensor] = []

    def extend(
        self, state: torch.Tensor, token: torch.Tensor, start: torch.Tensor, node: torch.Tensor
    ) -> NextCodeLogprobs:
        self.nodes.append(node)
        return self._engine.extend(state, token, start, node)


def test_candidates_do_not_depend_on_the_batch(world: TinySetup, engine: TorchEngine) -> None:
    guide = random_guide(world.catalog, seed=3)
    whole = beam(engine, world.prompts, width=6, guide=guide, prove=3)
    alone = beam(engine, world.prompts.select(np.array([3])), width=6, guide=guide, prove=3)
    mine = whole.select(np.array([3]))
    assert np.array_equal(alone.leaf, mine.leaf)
    assert np.allclose(alone.score, mine.score, atol=1e-5)
    assert mine.proved is not None
    assert alone.proved is not None
    assert alone.proved.tolist() == mine.proved.tolist()


def test_dead_nodes_stay_dead(world: TinySetup, engine: TorchEngine) -> None:
    guide = random_guide(world.catalog, seed=5)
    guide = replace(guide, seen_weight=50.0)  # the guide wants nothing but the history
    found = without_history(
        engine,
        world.prompts,
        search_fn=lambda e, p, allowed: beam(
            e, p, width=100, guide=guide, allowed=allowed, prove=5
        ),
        view=full_view(world.catalog.trie),
    )
    leaves = world.catalog.trie.num_leaves
    for prompt in range(len(world.prompts)):
        items = slice(*world.prompts.history_start[prompt : prompt + 2])
        seen = set(world.catalog.leaf_of_item[world.prompts.history[items]].tolist())
        got = found.leaf[found.start[prompt] : found.start[prompt + 1]].tolist()
        assert not seen & set(got)
        assert len(got) == leaves - len(seen)


def test_a_wider_search_follows_only_where_nothing_is_proved() -> None:
    world = tiny_setup(level_size=(8, 8, 8), num_items=300, lengths=(3, 2, 5, 4, 1, 6, 2, 3))
    engine = TorchEngine(world.model, world.tokenizer, world.version)
    guide = random_guide(world.catalog, seed=5)
    narrow = beam(engine, world.prompts, width=8, guide=guide, prove=2)
    wide = beam(engine, world.prompts, width=100, guide=guide, prove=2)
    found = wider_unless_proved(
        engine, world.prompts, width=8, wide=100, prove=2, count=8, guide=guide
    )
    assert narrow.proved is not None
    assert 0 < narrow.proved.sum() < len(world.prompts)
    assert found.cost.counts["searched_again"] == (~narrow.proved).sum()
    assert found.proved is not None
    assert found.cost.counts["proved"] == found.proved.sum()
    for prompt in range(len(world.prompts)):
        chosen = narrow if narrow.proved[prompt] else wide
        first = chosen.leaf[chosen.start[prompt] : chosen.start[prompt + 1]][:8]
        mine = found.leaf[found.start[prompt] : found.start[prompt + 1]]
        assert mine.tolist() == first.tolist()


def test_a_beam_narrower_than_what_is_to_be_proved_is_searched_again() -> None:
    world = tiny_setup(level_size=(8, 8, 8), num_items=300, lengths=(3, 2, 5))
    engine = TorchEngine(world.model, world.tokenizer, world.version)
    guide = random_guide(world.catalog, seed=5)
    found = wider_unless_proved(engine, world.prompts, width=1, wide=300, prove=4, guide=guide)
    wide = beam(engine, world.prompts, width=300, count=4, guide=guide, prove=4)
    assert found.cost.counts["searched_again"] == len(world.prompts)
    assert found.leaf.tolist() == wide.leaf.tolist()
    assert found.proved is not None
    assert found.proved.all()


def test_a_guide_of_another_catalog_is_refused(
    world: TinySetup, torch_engine: Callable[[TinySetup], TorchEngine]
) -> None:
    guide = random_guide(tiny_setup(seed=9).catalog, seed=0)
    with pytest.raises(CatalogError, match="the guide is for catalog"):
        beam(torch_engine(world), world.prompts, width=3, guide=guide)
