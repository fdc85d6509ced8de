"""Constrained draws against the probabilities that brute force gives."""

import numpy as np
import pytest

from orchard.testing import World
from rollout.engine.torch import TorchEngine
from rollout.search import Candidates, sample


def draw(engine: TorchEngine, world: World, **options: object) -> Candidates:
    settings = {"count": 12, "temperature": 1.0, "seed": 5, **options}
    return sample(engine, world.prompts, **settings)


def frequencies(candidates: Candidates, prompt: int, num_leaves: int) -> np.ndarray:
    rows = slice(candidates.start[prompt], candidates.start[prompt + 1])
    return np.bincount(candidates.leaf[rows], minlength=num_leaves)


def test_leaves_are_drawn_as_often_as_they_are_likely(world: World, engine: TorchEngine) -> None:
    count = 4000
    drawn = draw(engine, world, count=count)
    for prompt, leaf_logprob in enumerate(world.leaf_logprob):
        expected = count * np.exp(leaf_logprob)
        seen = frequencies(drawn, prompt, len(expected))
        square = ((seen - expected) ** 2 / expected).sum()
        # Chi-square has mean n and deviation sqrt(2 n); the seed is fixed, so this never flickers.
        freedom = len(expected) - 1
        assert square < freedom + 4 * np.sqrt(2 * freedom)


def test_temperature_flattens_each_choice_and_leaves_the_scores_alone(
    world: World, engine: TorchEngine
) -> None:
    hot, cold = (
        draw(engine, world, temperature=50.0, count=400),
        draw(engine, world, temperature=0.02),
    )
    for prompt, leaf_logprob in enumerate(world.leaf_logprob):
        rows = slice(cold.start[prompt], cold.start[prompt + 1])
        assert len(set(cold.leaf[rows].tolist())) == 1  # the greedy path
        assert (frequencies(hot, prompt, len(leaf_logprob)) > 0).mean() > 0.9
        for candidates in (hot, cold):
            rows = slice(candidates.start[prompt], candidates.start[prompt + 1])
            expected = leaf_logprob[candidates.leaf[rows]]
            assert np.allclose(candidates.score[rows], expected, atol=1e-5)


def test_draws_depend_on_seed_and_prompt_alone(world: World, engine: TorchEngine) -> None:
    together, order = draw(engine, world), np.array([3, 1])
    shuffled = sample(
        engine, world.prompts.select(order), count=12, temperature=1.0, seed=5
    )  # fmt: skip
    assert shuffled.leaf.tolist() == together.select(order).leaf.tolist()
    assert draw(engine, world).leaf.tolist() == together.leaf.tolist()
    assert draw(engine, world, seed=6).leaf.tolist() != together.leaf.tolist()


def test_more_draws_extend_fewer(world: World, engine: TorchEngine) -> None:
    few, many = draw(engine, world, count=6), draw(engine, world, count=20)
    num_leaves = world.catalogue.trie.num_leaves
    for prompt in range(len(world.prompts)):
        rest = frequencies(many, prompt, num_leaves) - frequencies(few, prompt, num_leaves)
        assert (rest >= 0).all()


def test_prompts_with_one_id_draw_alike_and_others_do_not(
    world: World, engine: TorchEngine
) -> None:
    twice = world.prompts.select(np.array([0, 0, 1]))
    drawn = sample(engine, twice, count=30, temperature=1.0, seed=0)
    assert drawn.leaf[:30].tolist() == drawn.leaf[30:60].tolist() != drawn.leaf[60:].tolist()


def test_draws_that_share_a_prefix_share_its_forward_pass(
    world: World, engine: TorchEngine
) -> None:
    one, many = draw(engine, world, count=1), draw(engine, world, count=2000)
    trie = world.catalogue.trie
    assert many.cost.passes <= trie.depth
    assert many.cost.forward_tokens <= len(world.prompts) * trie.num_nodes
    assert one.cost.forward_tokens <= len(world.prompts) * (trie.depth - 1)


@pytest.mark.parametrize("count", [1, 40])
def test_draws_are_best_first_and_add_up(world: World, engine: TorchEngine, count: int) -> None:
    drawn = draw(engine, world, count=count)
    assert np.diff(drawn.start).tolist() == [count] * len(world.prompts)
    assert np.allclose(drawn.logprob.sum(1), drawn.score, atol=1e-6)
    for prompt in range(len(world.prompts)):
        score = drawn.score[drawn.start[prompt] : drawn.start[prompt + 1]]
        assert (np.diff(score) <= 0).all()
    for leaf, node in zip(drawn.leaf, drawn.node, strict=True):
        assert tuple(node[node >= 0]) == world.leaf_path[leaf]
