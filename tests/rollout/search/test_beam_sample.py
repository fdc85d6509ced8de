"""Constrained draws against the probabilities that brute force gives."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from orchard.catalog.trie import Children
from orchard.testing import TinySetup
from rollout.candidates import Candidates
from rollout.engine.torch import TorchEngine
from rollout.search.beam import beam
from rollout.search.draws import draw as draw_children
from rollout.search.draws import sample


def draw(engine: TorchEngine, world: TinySetup, **options: object) -> Candidates:
    settings = {"count": 12, "temperature": 1.0, "seed": 5, **options}
    return sample(engine, world.prompts, **settings)


def frequencies(candidates: Candidates, prompt: int, num_leaves: int) -> np.ndarray:
    rows = slice(candidates.start[prompt], candidates.start[prompt + 1])
    return np.bincount(candidates.leaf[rows], minlength=num_leaves)


def tempered(world: TinySetup, leaf_logprob: np.ndarray, temperature: float) -> np.ndarray:
    """Probability of each leaf where every choice is made at a temperature."""
    weight: dict[tuple[int, ...], float] = {}
    for path, logprob in zip(world.leaf_path, leaf_logprob, strict=True):
        for depth in range(len(path) + 1):
            weight[path[:depth]] = weight.get(path[:depth], 0.0) + float(np.exp(logprob))
    result = np.ones(len(leaf_logprob))
    for leaf, path in enumerate(world.leaf_path):
        for depth in range(len(path)):
            above = [w for p, w in weight.items() if len(p) == depth + 1 and p[:-1] == path[:depth]]
            powers = np.array([weight[path[: depth + 1]], *above]) ** (1 / temperature)
            result[leaf] *= powers[0] / powers[1:].sum()
    return result


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_leaves_are_drawn_as_often_as_they_are_likely(
    world: TinySetup, engine: TorchEngine, temperature: float
) -> None:
    count = 4000
    drawn = draw(engine, world, count=count, temperature=temperature)
    for prompt, leaf_logprob in enumerate(world.leaf_logprob):
        expected = count * tempered(world, leaf_logprob, temperature)
        seen = frequencies(drawn, prompt, len(expected))
        # Leaves too rare for the statistic are counted together.
        rare = expected < 5
        expected, seen = (np.append(x[~rare], x[rare].sum()) for x in (expected, seen))
        square = ((seen - expected) ** 2 / expected.clip(1)).sum()
        # Chi-square has mean n and deviation sqrt(2 n); the seed is fixed, so this never flickers.
        freedom = len(expected) - 1
        assert square < freedom + 4 * np.sqrt(2 * freedom)


def test_the_ends_of_the_unit_interval_draw_the_first_and_the_last_child_that_may_be() -> None:
    children = Children(
        node=torch.arange(1, 10), owner=torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2]),
        start=torch.tensor([0, 2, 5, 9]),
    )  # fmt: skip
    logprob = torch.tensor([0.6, 0.4, 0.2, 0.3, 0.5, 0.1, 0.2, 0.3, 0.4]).log()
    may = torch.tensor([True, False, True, True, True, False, True, True, False])
    uniform = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.3999, 0.4001], dtype=torch.float64)
    at = torch.tensor([0, 1, 1, 2, 2, 2, 2])
    drawn = draw_children(logprob, children, may, at, uniform, 1.0)
    assert drawn.tolist() == [0, 2, 4, 6, 7, 6, 7]


def test_scores_are_the_policys_own_at_any_temperature(
    world: TinySetup, engine: TorchEngine
) -> None:
    for temperature in (0.02, 1.0, 50.0):
        drawn = draw(engine, world, temperature=temperature)
        for prompt, leaf_logprob in enumerate(world.leaf_logprob):
            rows = slice(drawn.start[prompt], drawn.start[prompt + 1])
            assert np.allclose(drawn.score[rows], leaf_logprob[drawn.leaf[rows]], atol=1e-5)


def test_a_low_temperature_is_greedy(world: TinySetup, engine: TorchEngine) -> None:
    greedy = beam(engine, world.prompts, width=1)
    drawn = draw(engine, world, temperature=1e-4)
    assert drawn.leaf.tolist() == np.repeat(greedy.leaf, 12).tolist()


def test_draws_depend_on_seed_and_prompt_alone(world: TinySetup, engine: TorchEngine) -> None:
    together, order = draw(engine, world), np.array([3, 1])
    shuffled = sample(
        engine, world.prompts.select(order), count=12, temperature=1.0, seed=5
    )  # fmt: skip
    assert shuffled.leaf.tolist() == together.select(order).leaf.tolist()
    assert draw(engine, world).leaf.tolist() == together.leaf.tolist()
    assert draw(engine, world, seed=6).leaf.tolist() != together.leaf.tolist()


def test_more_draws_extend_fewer(world: TinySetup, engine: TorchEngine) -> None:
    few, many = draw(engine, world, count=6), draw(engine, world, count=20)
    num_leaves = world.catalog.trie.num_leaves
    for prompt in range(len(world.prompts)):
        rest = frequencies(many, prompt, num_leaves) - frequencies(few, prompt, num_leaves)
        assert (rest >= 0).all()


def test_one_prompt_under_two_ids_draws_twice(world: TinySetup, engine: TorchEngine) -> None:
    thrice = replace(world.prompts.select(np.array([2, 2, 2])), id=np.array([2, 2, 8]))
    drawn = sample(engine, thrice, count=30, temperature=1.0, seed=0)
    assert drawn.leaf[:30].tolist() == drawn.leaf[30:60].tolist() != drawn.leaf[60:].tolist()


def test_draws_that_share_a_prefix_share_its_forward_pass(
    world: TinySetup, engine: TorchEngine
) -> None:
    one, many = draw(engine, world, count=1), draw(engine, world, count=2000)
    trie = world.catalog.trie
    assert many.cost.passes <= trie.depth
    assert many.cost.forward_tokens <= len(world.prompts) * trie.num_nodes
    assert one.cost.forward_tokens <= len(world.prompts) * (trie.depth - 1)


@pytest.mark.parametrize("count", [1, 40])
def test_draws_are_best_first_and_add_up(world: TinySetup, engine: TorchEngine, count: int) -> None:
    drawn = draw(engine, world, count=count)
    assert np.diff(drawn.start).tolist() == [count] * len(world.prompts)
    assert np.allclose(drawn.logprob.sum(1), drawn.score, atol=1e-6)
    for prompt in range(len(world.prompts)):
        score = drawn.score[drawn.start[prompt] : drawn.start[prompt + 1]]
        assert (np.diff(score) <= 0).all()
    trie = world.catalog.trie
    for leaf, node, logprob in zip(drawn.leaf, drawn.node, drawn.logprob, strict=True):
        assert tuple(node[node >= 0]) == world.leaf_path[leaf]
        above = np.concatenate([[0], node[:-1]])
        choice = (node >= 0) & (trie.num_children(torch.from_numpy(above)) > 1).numpy()
        assert np.array_equal(logprob < 0, choice)
