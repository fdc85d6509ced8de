"""Logged diagnostics of a search, on hand-made groups and against plain references."""

from dataclasses import replace

import numpy as np
import pytest

from orchard.evaluation.diagnostics import diagnose, grouped_spearman
from orchard.testing import TinySetup, tiny_setup
from orchard.types import Cost, ScoredTrees
from rollout.engine.torch import TorchEngine
from rollout.search.beam import beam
from rollout.search_trees import build_search_trees


def plain_ranks(values: np.ndarray) -> np.ndarray:
    return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])


def test_rank_correlations_equal_pearsons_of_the_ranks_group_by_group() -> None:
    draw = np.random.default_rng(0)
    group = np.repeat([0, 1, 2, 3], [7, 5, 1, 4])
    x, y = draw.integers(4, size=17).astype(float), draw.normal(size=17)
    y[13:] = 2.0
    found = grouped_spearman(x, y, group, 4)
    for one in (0, 1):
        expected = np.corrcoef(plain_ranks(x[group == one]), plain_ranks(y[group == one]))[0, 1]
        assert found[one] == pytest.approx(expected)
    assert np.isnan(found[2:]).all()
    assert grouped_spearman(np.exp(x), -y, group, 4)[0] == pytest.approx(-found[0])


@pytest.fixture
def world() -> TinySetup:
    return tiny_setup(lengths=(2, 1))


def scored(world: TinySetup) -> ScoredTrees:
    """The four likeliest leaves of two prompts; only the last of each group is worth anything."""
    engine = TorchEngine(world.model, world.tokenizer, world.version)
    found = beam(engine, world.prompts, width=4)
    trees = build_search_trees(world.prompts, found, world.tokenizer, world.version)
    reward = np.array([0, 0, 0, 1, 0, 0, 0, 0.5], np.float32)
    return ScoredTrees(trees=trees, reward=reward, parts={})


def test_a_search_is_described_by_what_it_found(world: TinySetup) -> None:
    judged = scored(world)
    trees = replace(judged.trees, cost=Cost(counts={"expanded_1": 6, "refused": 3}))
    figures = diagnose(replace(judged, trees=trees))
    assert figures["rewards/best"] == 0.75
    assert figures["rollout/expanded_1"] == 3
    assert figures["rollout/refused"] == 1.5
    prefixes = [figures[f"rollout/prefixes_{step}"] for step in (1, 2, 3)]
    assert prefixes == [
        len({(b, p[s]) for b, p in zip(trees.prompt_of_candidate, trees.paths(), strict=True)}) / 2
        for s in range(3)
    ]
    assert prefixes[2] == 4
    assert 0 < figures["rollout/diversity"] < 1


def test_likelihood_and_value_are_compared_with_reward_level_by_level(world: TinySetup) -> None:
    judged = scored(world)
    figures = diagnose(judged)
    # Candidates come likeliest first: the only one with a reward is the least likely.
    expected = np.corrcoef([3, 2, 1, 0], [1, 1, 1, 3])[0, 1]
    assert figures["rollout/logprob_spearman_3"] == pytest.approx(expected)
    assert not any("value" in name for name in figures)
    value = np.full(len(judged.trees.step), np.nan, np.float32)
    value[judged.trees.candidate] = judged.reward
    figures = diagnose(replace(judged, trees=replace(judged.trees, value=value)))
    assert figures["rollout/value_spearman_3"] == pytest.approx(1)
    assert "rollout/value_spearman_1" not in figures


def test_no_candidates_at_all_give_no_figures(world: TinySetup) -> None:
    judged = scored(world)
    empty = replace(
        judged.trees,
        candidate=np.zeros(0, np.int64),
        candidate_start=np.zeros(3, np.int64),
        leaf=np.zeros(0, np.int64),
        score=np.zeros(0, np.float32),
    )
    assert diagnose(ScoredTrees(trees=empty, reward=np.zeros(0, np.float32), parts={})) == {}
