"""The experts' reward of a row, against guides counted anew without the row or its user."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from orchard import ragged
from orchard.catalog.catalog import Catalog
from orchard.errors import ConfigError
from orchard.guide import fit
from orchard.guide.expert import Expert, LeafRows
from orchard.guide.guide import Guide
from orchard.guide.registry import EXPERTS
from orchard.settings import RewardsConfig, TransitionConfig
from orchard.testing import tiny_catalog
from orchard.types import SearchTrees
from rewards.expert import expert
from rewards.registry import RewardContext
from rewards.transition import transition
from rewards.transition_counts import count_transitions
from tests.fixtures.guides import random_guide
from tests.fixtures.registries import Borrow

Grow = Callable[..., SearchTrees]
NUM_ROWS = 30


def world(seed: int) -> tuple[Catalog, LeafRows, np.ndarray, np.ndarray]:
    """A catalog, rows of a few users, and their histories and targets as items."""
    catalog = tiny_catalog(seed=3, num_items=24)
    draw = np.random.default_rng(seed)
    start = ragged.starts(draw.integers(1, 6, NUM_ROWS))
    history, target = draw.integers(14, size=int(start[-1])), draw.integers(14, size=NUM_ROWS)
    rows = LeafRows.of_items(
        catalog,
        user=draw.integers(-3, 6, NUM_ROWS),
        history=history,
        history_start=start,
        target=target,
    )
    return catalog, rows, history, target


def chosen(rows: LeafRows, kept: np.ndarray) -> LeafRows:
    history, start = ragged.take(rows.history, rows.start, np.flatnonzero(kept))
    target, user = rows.target[kept], rows.user[kept]
    return replace(rows, user=user, history=history, start=start, target=target)


def counted_anew(guide: Guide, rows: LeafRows, row: int) -> Guide:
    """The guide whose transitions miss a row, and whose other experts miss its user."""
    without_row = fit.count(guide.catalog, chosen(rows, np.arange(NUM_ROWS) != row))
    without_user = fit.count(guide.catalog, chosen(rows, rows.user != rows.user[row]))
    experts = (without_row.experts[0], *without_user.experts[1:])
    assert experts[0].name == "transitions"
    return replace(guide, experts=experts, popularity=without_row.popularity)


def trees_of(
    grow: Grow, catalog: Catalog, rows: LeafRows, history: np.ndarray, target: np.ndarray
) -> SearchTrees:
    leaves = np.arange(catalog.trie.num_leaves)
    trees = grow(catalog, [leaves] * len(target), targets=target.tolist())
    prompts = replace(
        trees.prompts, id=np.arange(len(target)), history=history, history_start=rows.start
    )
    return replace(trees, prompts=prompts)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_row_gets_what_a_guide_counted_without_it_gives(trees_with: Grow, seed: int) -> None:
    catalog, rows, history, target = world(seed)
    trees = trees_of(trees_with, catalog, rows, history, target)
    guide = random_guide(catalog, seed=seed)
    found = expert(trees, RewardContext(catalog=catalog, guide=guide, rows=rows, first_row=0))
    size = sum(abs(term.weight) for term in guide.terms)
    leaves = np.arange(catalog.trie.num_leaves)
    differs = False
    whole = fit.with_weights(
        fit.count(catalog, rows),
        [*(t.weight for t in guide.terms), guide.popularity_weight, guide.seen_weight],
    )
    for row in range(NUM_ROWS):
        prompt = np.full(len(leaves), row)
        wanted = counted_anew(guide, rows, row).reward(trees.prompts, prompt, leaves) / size
        got = found[trees.candidate_start[row] : trees.candidate_start[row + 1]]
        order = trees.leaf[trees.candidate_start[row] : trees.candidate_start[row + 1]]
        np.testing.assert_allclose(got, wanted[order], atol=2e-5)
        told = whole.reward(trees.prompts, prompt, leaves) / size
        differs |= not np.allclose(wanted, told, atol=1e-3)
    assert differs  # with its own counts a row would be told its target


def test_nothing_is_taken_out_for_rows_that_were_not_counted(trees_with: Grow) -> None:
    catalog, rows, history, target = world(1)
    trees = trees_of(trees_with, catalog, rows, history, target)
    guide = fit.with_weights(
        fit.count(catalog, rows), np.linspace(0.1, 1, 2 + 2 * len(EXPERTS)).tolist()
    )
    size = sum(abs(term.weight) for term in guide.terms)
    wanted = guide.reward(trees.prompts, trees.prompt_of_candidate, trees.leaf) / size
    fresh = RewardContext(catalog=catalog, guide=guide, rows=rows)
    np.testing.assert_allclose(expert(trees, fresh), wanted, atol=2e-5)
    # Prompts of another split have ids of counted rows, and other items.
    other = replace(trees, prompts=replace(trees.prompts, id=np.roll(trees.prompts.id, 1)))
    context = RewardContext(catalog=catalog, guide=guide, rows=rows, first_row=0)
    np.testing.assert_allclose(expert(other, context), wanted, atol=2e-5)
    # Fresh rows that are counted after others.
    later = replace(
        rows, user=np.concatenate([rows.user[:1], rows.user]),
        history=np.concatenate([rows.history[:1], rows.history]),
        start=np.concatenate([[0], rows.start + 1]),
        target=np.concatenate([rows.target[:1], rows.target]),
    )  # fmt: skip
    context = RewardContext(catalog=catalog, guide=guide, rows=later, first_row=1)
    shifted = replace(trees, prompts=replace(trees.prompts, id=trees.prompts.id + 1))
    context_0 = RewardContext(catalog=catalog, guide=guide, rows=later, first_row=0)
    np.testing.assert_array_equal(expert(trees, context), expert(shifted, context_0))


def test_one_term_is_the_transition_reward_up_to_a_constant(trees_with: Grow) -> None:
    catalog, rows, history, target = world(2)
    trees = trees_of(trees_with, catalog, rows, history, target)
    guide = fit.with_weights(fit.count(catalog, rows, ["transitions"]), [0.0, 3.0, 0.0, 0.0])
    context = RewardContext(catalog=catalog, guide=guide, rows=rows, first_row=0)
    found = expert(trees, context)
    counts = count_transitions(
        rows.history, rows.start, rows.target, num_leaves=rows.num_leaves, decay=0.6
    )
    settings = RewardsConfig(transition=TransitionConfig(decay=0.6, floor=0.01))
    special = transition(
        trees, RewardContext(catalog=catalog, settings=settings, transitions=counts)
    )
    np.testing.assert_allclose(found, special - np.log(0.01), atol=2e-4)


def test_an_expert_whose_rows_cannot_be_taken_out_is_refused(borrow: Borrow) -> None:
    catalog, rows, _, _ = world(0)
    borrow(EXPERTS).register("towers")(lambda rows: made(rows))
    guide = fit.count(catalog, rows, ["transitions", "towers"])
    context = RewardContext(catalog=catalog, guide=guide, rows=rows, first_row=0)
    with pytest.raises(ConfigError, match="expert towers, from which") as refused:
        _ = context.expert_counts
    assert refused.value.code == "config.expert_without_counts"
    with pytest.raises(ConfigError, match="needs a guide.*orchard fit guide") as refused:
        _ = RewardContext(catalog=catalog).expert_counts
    assert refused.value.code == "config.no_guide"


def made(rows: LeafRows) -> Expert:
    nothing = np.zeros(0, np.int64)
    return Expert(
        name="towers",
        start=np.zeros(rows.num_leaves + 1, np.int64),
        after=nothing,
        strength=nothing.astype(np.float32),
    )
