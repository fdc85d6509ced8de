"""Test sibling-relative credit against a worked example, a plain reference and identities."""

from collections import defaultdict
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.advantage.estimators import ESTIMATORS, compute_advantages
from learner.advantage.sibling import node_advantages, sibling
from learner.batch.pack import pack
from orchard.catalog.catalog import from_codes
from orchard.settings import LearnerConfig
from orchard.testing import tiny_policy, tiny_prompts
from orchard.types import PolicyVersion, ScoredTrees
from rollout.engine.torch import TorchEngine
from rollout.search.beam import beam
from rollout.search_trees import build_search_trees

Grow = Callable[..., ScoredTrees]
EPSILON = 1e-4
CODES = ((1, 2, 3), (1, 2, 4), (1, 5, 6), (7, 8, 9))


def worked_example(num_prompts: int = 1) -> tuple[ScoredTrees, list[tuple[int, ...]]]:
    """Groups of the four sequences, rewards 1, 0, 0, 0; and the codes of each candidate."""
    catalog = from_codes([*CODES, (0, 0, 0)], level_size=(8, 9, 10))
    model, tokenizer = tiny_policy(catalog)
    version = PolicyVersion(step=0, digest="")
    prompts = tiny_prompts(catalog, [2] * num_prompts)
    candidates = beam(TorchEngine(model, tokenizer, version), prompts, width=5)
    codes = [tuple(row) for row in catalog.codes[catalog.item_of_leaf[candidates.leaf]].tolist()]
    kept = np.array([code in CODES for code in codes])
    start = np.concatenate([[0], np.cumsum(kept)])[candidates.start]
    part = type(candidates)(
        start=start, node=candidates.node[kept], logprob=candidates.logprob[kept],
        score=candidates.score[kept], leaf=candidates.leaf[kept], cost=candidates.cost,
    )  # fmt: skip
    codes = [code for code in codes if code in CODES]
    reward = np.array([float(code == CODES[0]) for code in codes], np.float32)
    trees = build_search_trees(prompts, part, tokenizer, version)
    return ScoredTrees(trees=trees, reward=reward, parts={}), codes


def test_nothing_counts_past_the_end_of_a_candidate(score_random: Grow) -> None:
    scored = score_random([6, 4, 5])
    credit, outside = sibling(scored, EPSILON), scored.trees.paths() < 0
    assert outside.any()
    assert not credit.weight[outside].any()
    assert not credit.advantage[outside].any()


def test_credit_equals_the_worked_example() -> None:
    scored, codes = worked_example()
    credit = sibling(scored, EPSILON)
    expected = {
        (1, 2, 3): [0.9994, 0.9996, 0.9998],
        (1, 2, 4): [0.9994, 0.9996, -0.9998],
        (1, 5, 6): [0.9994, -0.9996, 0],
        (7, 8, 9): [-0.9994, 0, 0],
    }
    share = {(1, 2, 3): 1 / 12, (1, 2, 4): 1 / 12, (1, 5, 6): 1 / 12, (7, 8, 9): 1 / 4}
    for row, code in enumerate(codes):
        np.testing.assert_allclose(credit.advantage[row], expected[code], atol=1e-4)
        assert credit.weight[row, 0] == pytest.approx(share[code])


def test_equal_codes_of_several_prompts_never_meet() -> None:
    single, (many, _) = worked_example()[0], worked_example(3)
    alone, together = sibling(single, EPSILON), sibling(many, EPSILON)
    for row in range(3):
        part = slice(4 * row, 4 * row + 4)
        order = np.lexsort(many.trees.leaf[part][None])
        single_order = np.lexsort(single.trees.leaf[None])
        np.testing.assert_array_equal(
            together.advantage[part][order], alone.advantage[single_order]
        )
        np.testing.assert_allclose(3 * together.weight[part][order], alone.weight[single_order])


@pytest.mark.slow
@given(
    groups=st.lists(
        st.lists(
            st.tuples(st.integers(0, 22), st.sampled_from([0.0, 1.0, -0.25, 0.1])),
            min_size=1,
            max_size=8,
        ),
        min_size=1,
        max_size=3,
    )
)
def test_advantages_and_weights_equal_their_definitions(
    score_leaves: Grow, groups: list[list[tuple[int, float]]]
) -> None:
    scored = score_leaves(
        [[leaf for leaf, _ in g] for g in groups], [[r for _, r in g] for g in groups]
    )
    trees, credit = scored.trees, sibling(scored, EPSILON)
    behind: dict[int, list[float]] = defaultdict(list)
    for path, reward in zip(trees.paths(), scored.reward, strict=True):
        for node in path[path >= 0]:
            behind[int(node)].append(float(reward))
    children: dict[int, list[int]] = defaultdict(list)
    for node in behind:
        children[int(trees.parent[node])].append(node)
    for row, path in enumerate(trees.paths()):
        size = len(groups[trees.prompt_of_candidate[row]])
        for step, node in enumerate(path[path >= 0]):
            means = [np.mean(behind[child]) for child in children[int(trees.parent[node])]]
            expected = (np.mean(behind[int(node)]) - np.mean(means)) / (np.std(means) + EPSILON)
            assert credit.advantage[row, step] == pytest.approx(expected, abs=1e-5)
            weight = 1 / (len(groups) * size * len(behind[int(node)]))
            assert credit.weight[row, step] == pytest.approx(weight)


def test_advantages_of_siblings_sum_to_zero_and_an_only_child_has_none(score_random: Grow) -> None:
    scored = score_random([8, 5, 9])
    trees, advantage = scored.trees, node_advantages(scored, EPSILON)
    inner = trees.step > 0
    total = np.bincount(trees.parent[inner], advantage[inner], minlength=len(advantage))
    np.testing.assert_allclose(total, 0, atol=1e-9)
    alone = np.bincount(trees.parent[inner], minlength=len(advantage))[trees.parent] == 1
    assert (inner & alone).any()
    assert not advantage[inner & alone].any()


def test_the_sum_adds_two_losses_and_the_blend_averages_two_advantages(
    score_random: Grow,
) -> None:
    scored = score_random([6, 4])
    group, nodes = (ESTIMATORS[name](scored, EPSILON) for name in ("group", "sibling"))
    first, second = compute_advantages(
        scored, LearnerConfig(estimator="group_sibling", sibling_weight=0.5)
    )
    np.testing.assert_array_equal(first.weight, group.weight)
    np.testing.assert_array_equal(second.advantage, nodes.advantage)
    np.testing.assert_allclose(second.weight, 0.5 * nodes.weight)
    (blend,) = compute_advantages(scored, LearnerConfig(estimator="blend"))
    steps = (scored.trees.paths() >= 0).sum(1)
    expected = 0.5 * group.advantage[:, 0] + 0.5 * nodes.advantage.sum(1) / steps
    np.testing.assert_allclose(blend.advantage[:, 0], expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(blend.weight, group.weight)


def test_a_packed_node_carries_its_term_once() -> None:
    scored, _ = worked_example()
    catalog = from_codes([*CODES, (0, 0, 0)], level_size=(8, 9, 10))
    batch = pack(scored, [sibling(scored, EPSILON)], tiny_policy(catalog)[1])
    advantage = node_advantages(scored, EPSILON)
    carried = dict(
        zip(
            batch.chosen.tolist(), (batch.advantage_pos + batch.advantage_neg).tolist(), strict=True
        )
    )
    free = ~scored.trees.forced
    nodes = np.flatnonzero(scored.trees.step > 0)[free]
    for node in nodes:
        state = int(scored.trees.state[node])
        assert carried[state] == pytest.approx(advantage[node] / 4, abs=1e-6)
    np.testing.assert_allclose(batch.kl_weight, 1 / 4)
