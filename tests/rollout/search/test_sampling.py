"""Draws without replacement against exact probabilities, and what dynamic sampling keeps."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, permutations, product

import numpy as np
import pytest

from orchard.catalog.catalog import from_codes
from orchard.testing import TinySetup, tiny_policy, tiny_prompts, tiny_setup
from orchard.types import Prompts
from rollout.candidates import Candidates
from rollout.engine.torch import TorchEngine
from rollout.search.beam import beam
from rollout.search.draws import sample
from rollout.search.sampling import beam_sample, dynamic


def draw(engine: TorchEngine, prompts: Prompts, **options: object) -> Candidates:
    return beam_sample(engine, prompts, **{"width": 5, "temperature": 1.0, "seed": 3} | options)


def dynamically(engine: TorchEngine, world: TinySetup, prompts: Prompts, count: int) -> Candidates:
    return dynamic(engine, prompts, world.catalog, count=count, temperature=1.0, seed=3)


def leaves(candidates: Candidates, prompt: int) -> list[int]:
    return candidates.leaf[candidates.start[prompt] : candidates.start[prompt + 1]].tolist()


def many(prompts: Prompts, row: int, count: int) -> Prompts:
    """One prompt under many ids."""
    return replace(prompts.select(np.full(count, row)), id=np.arange(count))


def probability_of_sets(leaf_probability: np.ndarray, size: int) -> dict[tuple[int, ...], float]:
    """Return the probability of each set of leaves drawn one after another without replacement."""
    chance: dict[tuple[int, ...], float] = {}
    for chosen in combinations(range(len(leaf_probability)), size):
        for order in permutations(chosen):
            left, total = 1.0, 1.0
            for leaf in order:
                total *= leaf_probability[leaf] / left
                left -= leaf_probability[leaf]
            chance[chosen] = chance.get(chosen, 0.0) + total
    return chance


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 2, 3])
def test_sets_of_leaves_are_as_frequent_as_draws_without_replacement(
    torch_engine: Callable[[TinySetup], TorchEngine], width: int
) -> None:
    small = tiny_setup(level_size=(2, 2, 3), num_items=9, varying_depth=True, seed=2)
    count, probability = 4000, np.exp(small.leaf_logprob[1])
    assert 5 <= len(probability) <= 9
    drawn = draw(torch_engine(small), many(small.prompts, 1, count), width=width)
    seen = Counter(tuple(sorted(leaves(drawn, prompt))) for prompt in range(count))
    chance = probability_of_sets(probability, width)
    assert set(seen) <= set(chance)
    expected = {one: count * p for one, p in chance.items()}
    common = [one for one, number in expected.items() if number >= 5]
    observed = np.array([seen[one] for one in common] + [count - sum(seen[one] for one in common)])
    wanted = np.array([expected[one] for one in common])
    wanted = np.append(wanted, max(1.0, count - wanted.sum()))
    square = ((observed - wanted) ** 2 / wanted).sum()
    # Chi-square has mean n and deviation sqrt(2 n); the seed is fixed, so this never flickers.
    assert square < len(common) + 4 * np.sqrt(2 * len(common))


def test_scores_are_the_policys_own_and_no_leaf_comes_twice(
    world: TinySetup, engine: TorchEngine
) -> None:
    for temperature in (0.3, 1.0, 20.0):
        drawn = draw(engine, world.prompts, temperature=temperature)
        for prompt, leaf_logprob in enumerate(world.leaf_logprob):
            rows = slice(drawn.start[prompt], drawn.start[prompt + 1])
            assert len(set(drawn.leaf[rows].tolist())) == 5
            assert np.allclose(drawn.score[rows], leaf_logprob[drawn.leaf[rows]], atol=1e-5)
            assert np.allclose(drawn.logprob[rows].sum(1), drawn.score[rows], atol=1e-6)
            assert (np.diff(drawn.score[rows]) <= 0).all()


def test_a_stochastic_beam_as_wide_as_the_catalog_is_a_beam(
    world: TinySetup, engine: TorchEngine
) -> None:
    every, drawn = beam(engine, world.prompts, width=100), draw(engine, world.prompts, width=100)
    assert drawn.leaf.tolist() == every.leaf.tolist()
    assert drawn.cost == every.cost


def test_a_cold_stochastic_beam_of_one_is_greedy(world: TinySetup, engine: TorchEngine) -> None:
    greedy = beam(engine, world.prompts, width=1)
    assert (
        draw(engine, world.prompts, width=1, temperature=1e-4).leaf.tolist() == greedy.leaf.tolist()
    )


def test_a_hot_stochastic_beam_draws_codes_alike(
    torch_engine: Callable[[TinySetup], TorchEngine],
) -> None:
    world = tiny_setup(level_size=(4,), num_items=12)
    drawn = draw(torch_engine(world), many(world.prompts, 0, 2000), width=1, temperature=1e6)
    num_leaves = world.catalog.trie.num_leaves
    share = np.bincount(drawn.leaf, minlength=num_leaves) / 2000
    assert np.allclose(share, 1 / num_leaves, atol=4 * np.sqrt(0.25 / 2000))


def test_a_wider_stochastic_beam_holds_a_narrower_one(
    world: TinySetup, engine: TorchEngine
) -> None:
    few, more = draw(engine, world.prompts, width=3), draw(engine, world.prompts, width=8)
    for prompt in range(len(world.prompts)):
        assert set(leaves(few, prompt)) <= set(leaves(more, prompt))


def test_draws_depend_on_seed_and_prompt_alone(world: TinySetup, engine: TorchEngine) -> None:
    together, order = draw(engine, world.prompts), np.array([3, 1])
    alone = draw(engine, world.prompts.select(order))
    assert alone.leaf.tolist() == together.select(order).leaf.tolist()
    assert draw(engine, world.prompts).leaf.tolist() == together.leaf.tolist()
    assert draw(engine, world.prompts, seed=4).leaf.tolist() != together.leaf.tolist()
    twins = draw(engine, many(world.prompts, 1, 20))
    assert len({tuple(leaves(twins, prompt)) for prompt in range(20)}) > 1


@pytest.mark.parametrize("width", [8, 16])
def test_three_levels_cost_what_a_beam_costs(
    torch_engine: Callable[[TinySetup], TorchEngine], width: int
) -> None:
    every = from_codes(list(product(range(16), range(2), range(2))))
    model, vocabulary = tiny_policy(every)
    prompts = tiny_prompts(every, (1, 2))
    bushy = TinySetup(catalog=every, model=model, tokenizer=vocabulary, prompts=prompts)
    cost = draw(torch_engine(bushy), prompts, width=width).cost
    # 17 and 33 with the pass over the prompt, which counts for one.
    assert cost.forward_tokens == 2 * 2 * width
    assert cost.prefill_tokens == len(prompts.token)


def expected_choice(drawn: list[int], target: int, count: int) -> Counter[int]:
    """The plain reading of the rule: targets, then round after round by frequency."""
    left = Counter(drawn)
    chosen = [target] * left.pop(target, 0)
    while left:
        chosen += [leaf for leaf, _ in left.most_common()]
        left -= Counter(list(left))
    return Counter(chosen[:count])


@pytest.mark.parametrize("count", [1, 6, 20])
def test_dynamic_sampling_keeps_targets_then_distinct_then_frequent_leaves(
    world: TinySetup, engine: TorchEngine, count: int
) -> None:
    prompts = many(world.prompts, 2, 40)
    drawn = sample(engine, prompts, count=-(-3 * count // 2), temperature=1.0, seed=3)
    kept = dynamically(engine, world, prompts, count)
    target = int(world.catalog.leaf_of_item[prompts.target[0]])
    for prompt in range(len(prompts)):
        before, after = Counter(leaves(drawn, prompt)), Counter(leaves(kept, prompt))
        assert after <= before
        assert after.total() == count
        expected = expected_choice(leaves(drawn, prompt), target, count)
        assert after[target] == expected[target]
        # Which of equally frequent leaves goes first is not the rule's business.
        assert len(after) == len(expected)
        assert sorted(before[leaf] for leaf in after) == sorted(before[leaf] for leaf in expected)


def test_dynamic_sampling_does_not_depend_on_the_batch(
    world: TinySetup, engine: TorchEngine
) -> None:
    together, order = dynamically(engine, world, world.prompts, 7), np.array([2, 0])
    alone = dynamically(engine, world, world.prompts.select(order), 7)
    assert alone.leaf.tolist() == together.select(order).leaf.tolist()
    assert np.diff(together.start).tolist() == [7] * len(world.prompts)
    for prompt, leaf_logprob in enumerate(world.leaf_logprob):
        rows = slice(together.start[prompt], together.start[prompt + 1])
        assert np.allclose(together.score[rows], leaf_logprob[together.leaf[rows]], atol=1e-5)


def test_equal_histories_keep_each_its_own_target(world: TinySetup, engine: TorchEngine) -> None:
    twins = replace(
        world.prompts.select(np.array([1, 1])), id=np.array([5, 5]), target=np.array([0, 1])
    )
    draws = sample(engine, twins, count=60, temperature=1.0, seed=3)
    kept = dynamically(engine, world, twins, 40)
    for prompt, item in enumerate((0, 1)):
        leaf = int(world.catalog.leaf_of_item[item])
        assert leaves(kept, prompt).count(leaf) == min(40, leaves(draws, prompt).count(leaf))
