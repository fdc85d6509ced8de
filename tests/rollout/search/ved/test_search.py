"""Value-guided decoding: its budget, its parts one by one, and a plain version of the whole."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchard.errors import ConfigError, EngineError
from orchard.settings import VedConfig
from orchard.testing import TinySetup, tiny_setup
from rollout.engine.torch import TorchEngine
from rollout.search.beam import Candidates, beam
from rollout.search.ved.search import ved
from rollout.search_trees import build_search_trees
from tests.fixtures.guides import random_guide
from tests.fixtures.values import leaf_values, with_head


def leaves(found: Candidates) -> list[list[int]]:
    return [part.tolist() for part in np.split(found.leaf, found.start[1:-1])]


@pytest.mark.slow
@settings(max_examples=50)
@given(
    extra=st.integers(0, 25),
    choice=st.fixed_dictionaries(
        {
            "width": st.integers(1, 4),
            "exploration": st.sampled_from([0.0, 1.0, 5.0]),
            "expand_root": st.booleans(),
            "warm_visits": st.booleans(),
            "to_leaf": st.booleans(),
            "count_leaves": st.booleans(),
            "traversals": st.integers(1, 4),
        }
    ),
    shape=st.tuples(*[st.integers(1, 5)] * 3),
    seed=st.integers(0, 2**16),
    varying=st.booleans(),
)
def test_no_prompt_ever_costs_more_than_its_budget(
    extra: int, choice: dict[str, int], shape: tuple[int, int, int], seed: int, varying: bool
) -> None:
    world = tiny_setup(
        seed=seed, level_size=shape, num_items=40, varying_depth=varying, lengths=(1, 4)
    )
    engine, depth = with_head(world, seed=seed), world.catalog.trie.depth
    least = 1 + choice["width"] * (depth if choice["count_leaves"] else depth - 1)
    config = VedConfig.model_validate({**choice, "budget": least + extra})
    every = beam(engine, world.prompts, width=100)
    for row in range(len(world.prompts)):
        alone = np.array([row])
        found = ved(engine, world.prompts.select(alone), config, count=6, seed=1)
        counted = found.cost.forward_tokens + choice["count_leaves"] * found.cost.leaf_tokens
        assert 1 + counted <= config.budget
        assert len(set(found.leaf.tolist())) == len(found.leaf) <= 6
        known = every.select(alone)
        place = known.leaf.argsort()[found.leaf]
        np.testing.assert_allclose(found.logprob, known.logprob[place], atol=1e-4)
        np.testing.assert_allclose(found.score, known.score[place], atol=1e-4)
        assert np.array_equal(found.node, known.node[place])
        assert (np.diff(found.score) <= 0).all()


def test_the_tree_holds_the_beam_that_it_began_with(wide: TinySetup, engine: TorchEngine) -> None:
    found = ved(engine, wide.prompts, VedConfig(budget=9, width=4), count=1000, seed=0)
    likeliest = beam(engine, wide.prompts, width=4)
    for row, group in enumerate(leaves(likeliest)):
        values = leaf_values(found, row)
        assert not np.isnan([values[leaf] for leaf in group]).any()


@pytest.mark.slow
def test_selection_and_gate_both_act_within_the_budget_of_a_beam_of_sixteen(
    wide: TinySetup, engine: TorchEngine
) -> None:
    found = ved(engine, wide.prompts, VedConfig(), count=16, seed=0)
    counts, num_prompts = found.cost.counts, len(wide.prompts)
    assert found.cost.forward_tokens <= 32 * num_prompts
    assert counts["traversals"] >= num_prompts
    assert counts["overruled"] > 0
    assert counts["refused"] > 0
    assert counts["expanded_2"] > 0
    open_root, closed_root = (
        ved(engine, wide.prompts, VedConfig(width=2, expand_root=on), count=16, seed=0).cost
        for on in (True, False)
    )
    assert open_root.counts["expanded_1"] > 0
    assert closed_root.counts["expanded_1"] == 0


@pytest.mark.slow
def test_the_leaves_of_the_highest_value_are_chosen(wide: TinySetup, engine: TorchEngine) -> None:
    few, all_ = (ved(engine, wide.prompts, VedConfig(), count=n, seed=0) for n in (4, 1000))
    for row, group in enumerate(leaves(few)):
        known = {leaf: one for leaf, one in leaf_values(all_, row).items() if not np.isnan(one)}
        assert set(group) == set(sorted(known, key=lambda leaf: -known[leaf])[:4])


@pytest.mark.slow
def test_known_distributions_complete_a_group_without_a_forward_pass(
    wide: TinySetup, engine: TorchEngine
) -> None:
    config = VedConfig(budget=9, width=4)
    four, many = (ved(engine, wide.prompts, config, count=n, seed=0) for n in (4, 16))
    assert many.cost.forward_tokens == four.cost.forward_tokens
    assert many.cost.passes == four.cost.passes
    assert four.cost.counts["completed"] == 0
    unknown = [np.isnan(list(leaf_values(many, row).values())) for row in range(5)]
    assert many.cost.counts["completed"] == np.concatenate(unknown).sum() > 0


@pytest.mark.slow
def test_several_traversals_share_a_pass(wide: TinySetup, engine: TorchEngine) -> None:
    one, four = (
        ved(engine, wide.prompts, VedConfig(traversals=n), count=16, seed=0).cost for n in (1, 4)
    )
    assert four.passes < 0.6 * one.passes
    assert four.forward_tokens > 0.8 * one.forward_tokens


@pytest.mark.slow
def test_the_nodes_of_the_trees_carry_their_values(wide: TinySetup, engine: TorchEngine) -> None:
    found = ved(engine, wide.prompts, VedConfig(), count=8, seed=0)
    trees = build_search_trees(wide.prompts, found, wide.tokenizer, wide.version)
    assert trees.value is not None
    assert found.value is not None
    path = trees.paths()
    np.testing.assert_array_equal(trees.value[path], found.value)
    assert np.isnan(trees.value[trees.step == 0]).all()


def test_a_budget_below_the_beam_and_a_policy_without_values_are_refused(
    wide: TinySetup, engine: TorchEngine
) -> None:
    with pytest.raises(ConfigError, match="budget = 16 cannot cover depth 3 with beam 8"):
        ved(engine, wide.prompts, VedConfig(budget=16), count=8, seed=0)
    with pytest.raises(ConfigError, match="raise it to at least 25"):
        ved(engine, wide.prompts, VedConfig(budget=24, count_leaves=True), count=8, seed=0)
    plain = tiny_setup()
    blind = TorchEngine(plain.model, plain.tokenizer, plain.version)
    with pytest.raises(EngineError, match=r"set model\.value_head = true"):
        ved(blind, plain.prompts, VedConfig(), count=8, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", [False, True])
def test_experts_may_give_the_values(
    wide: TinySetup, engine: TorchEngine, likelihood: bool
) -> None:
    guide = random_guide(wide.catalog, seed=2)
    config = VedConfig(budget=60, width=4, likelihood=likelihood, entropy_weight=0.0)
    found = ved(engine, wide.prompts, config, count=8, seed=1, critic=guide)
    prompt = np.repeat(np.arange(len(wide.prompts)), found.count)
    reward = guide.reward(wide.prompts, prompt, found.leaf)
    assert found.value is not None
    last = found.value[range(len(found.leaf)), (found.node >= 0).sum(1) - 1]
    evaluated = ~np.isnan(last)
    assert evaluated.mean() > 0.5
    np.testing.assert_allclose(last[evaluated], reward[evaluated], atol=1e-5)
    # Scores are the policy's own.
    every = beam(engine, wide.prompts, width=200)
    for row, rows in enumerate(np.split(np.arange(len(found.leaf)), found.start[1:-1])):
        known = every.select(np.array([row]))
        place = known.leaf.argsort()[found.leaf[rows]]
        np.testing.assert_allclose(found.score[rows], known.score[place], atol=1e-4)


@pytest.mark.slow
def test_likelihood_changes_what_a_guided_search_finds(
    wide: TinySetup, engine: TorchEngine
) -> None:
    guide = random_guide(wide.catalog, seed=2)
    published, both = (
        ved(
            engine, wide.prompts, VedConfig(budget=40, width=4, likelihood=likelihood),
            count=8, seed=1, critic=guide,
        )
        for likelihood in (False, True)
    )  # fmt: skip
    assert leaves(published) != leaves(both)
    prompt = np.repeat(np.arange(len(wide.prompts)), published.count)
    mine = np.repeat(np.arange(len(wide.prompts)), both.count)
    # What the search ranks by is larger where it is part of the priority.
    assert (both.score + guide.reward(wide.prompts, mine, both.leaf)).mean() > (
        published.score + guide.reward(wide.prompts, prompt, published.leaf)
    ).mean()
