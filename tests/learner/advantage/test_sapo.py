"""Test step-aligned credit against a worked example, a plain reference and packed groups."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from learner.advantage.estimators import ESTIMATORS, compute_advantages
from learner.batch.pack import flatten, pack
from learner.logprobs import choice_logprobs, to_tensors
from learner.loss import policy_loss
from orchard.catalog import catalog as catalogs
from orchard.catalog.catalog import Catalog
from orchard.settings import LearnerConfig
from orchard.testing import tiny_policy, tiny_prompts
from orchard.types import Cost, PolicyVersion, ScoredTrees, SearchTrees
from rewards.steps import add_step_rewards, step_matches, step_statistics
from rollout.candidates import Candidates
from rollout.search.thoughts import Thoughts, attach_thoughts
from rollout.search_trees import build_search_trees

EPSILON = 1e-6
MATCHES = [(1, 1, 0), (1, 0, 0), (0, 0, 0), (0, 0, 0)]


@pytest.fixture(scope="module")
def cube() -> Catalog:
    """Return a catalog of all sequences of three binary codes, with every pattern of matches."""
    return catalogs.from_codes(list(product((0, 1), repeat=3)))


def plain(cube: Catalog, groups: list[list[int]], target: list[int]) -> ScoredTrees:
    """Build groups of chosen leaves, whose prompts have chosen target items."""
    prompts = tiny_prompts(cube, range(1, len(groups) + 1))
    return scored(grown(cube, replace(prompts, target=np.array(target)), groups))


def grown(cube: Catalog, prompts: object, groups: list[list[int]]) -> SearchTrees:
    leaf = np.concatenate([np.array(g, np.int64) for g in groups])
    node = cube.trie.path(cube.trie.leaf_node[leaf]).numpy()
    draw = np.random.default_rng(len(leaf))
    node_logprob = -2 * draw.random((len(groups), cube.trie.num_nodes)).astype(np.float32)
    size = [len(group) for group in groups]
    logprob = node_logprob[np.repeat(np.arange(len(groups)), size)[:, None], node]
    candidates = Candidates(
        start=np.cumsum([0, *size]), node=node, logprob=logprob, score=logprob.sum(1),
        leaf=leaf, cost=Cost(),
    )  # fmt: skip
    version = PolicyVersion(step=0, digest="0" * 64)
    return build_search_trees(prompts, candidates, tiny_policy(cube)[1], version)  # pyright: ignore


def scored(trees: SearchTrees) -> ScoredTrees:
    draw = np.random.default_rng(1)
    return ScoredTrees(
        trees=trees, reward=draw.normal(size=len(trees.leaf)).astype(np.float32), parts={}
    )


def thinking(
    cube: Catalog, samples: list[int], *, codes: int = 1, missing: int = -1
) -> ScoredTrees:
    """Prompts with so many samples of three blocks each; `missing` lacks its last block.

    Opening tags are forced. After each thought `codes` leaves are drawn.
    """
    draw = np.random.default_rng(7)
    total = sum(samples)
    blocks = np.full(total, 3)
    if missing >= 0:
        blocks[missing] = 2
    length = draw.integers(2, 6, blocks.sum())
    forced = np.concatenate([np.arange(n) == 0 for n in length])
    tokenizer = tiny_policy(cube)[1]
    behaviour = np.where(forced, 0, -3 * draw.random(len(forced)))
    thoughts = Thoughts(
        sample_start=np.cumsum([0, *samples]),
        block_start=np.cumsum([0, *blocks]),
        token=draw.integers(tokenizer.size, size=len(forced)).astype(np.int32),
        token_start=np.cumsum([0, *length]),
        logprob=behaviour.astype(np.float32),
        forced=forced,
        cost=Cost(),
    )
    prompts = tiny_prompts(cube, range(1, len(samples) + 1))
    leaves = [draw.integers(8, size=codes).tolist() for _ in range(total)]
    trees = attach_thoughts(prompts, thoughts, grown(cube, thoughts.contexts(prompts), leaves), 3)
    return scored(trees)


def test_step_advantages_equal_the_worked_example(cube: Catalog) -> None:
    leaf = [4 * (1 - a) + 2 * (1 - b) + (1 - c) for a, b, c in MATCHES]
    judged = add_step_rewards(plain(cube, [leaf], [0]), cube)
    assert judged.step_reward is not None
    assert judged.step_reward.tolist() == [list(map(float, m)) for m in MATCHES]
    credit = ESTIMATORS["sapo"](judged, EPSILON)
    expected = [[0.8660, 1.5, 0], [0.8660, -0.5, 0], [-0.8660, -0.5, 0], [-0.8660, -0.5, 0]]
    np.testing.assert_allclose(credit.advantage, expected, atol=5e-5)
    np.testing.assert_allclose(credit.weight, 1 / (4 * 3), rtol=1e-6)
    statistics = step_statistics(judged)
    assert statistics == {"match_1": 0.5, "match_2": 0.25, "match_3": 0, "step_signal_share": 1}


def test_steps_that_were_not_judged_have_no_statistics(cube: Catalog) -> None:
    assert step_statistics(plain(cube, [[0, 1]], [0])) == {}


def test_a_code_matches_by_position_or_only_below_a_matching_prefix(cube: Catalog) -> None:
    trees = plain(cube, [[0b011, 0b101, 0b110]], [0b111]).trees
    assert step_matches(trees, cube).tolist() == [[0, 1, 1], [1, 0, 1], [1, 1, 0]]
    assert step_matches(trees, cube, prefix=True).tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0]]


def test_two_prompts_give_what_each_gives_alone(cube: Catalog) -> None:
    groups, target = [[0, 1, 5], [7, 7, 2, 4]], [0, 6]
    together = ESTIMATORS["sapo"](add_step_rewards(plain(cube, groups, target), cube), EPSILON)
    alone = [
        ESTIMATORS["sapo"](add_step_rewards(plain(cube, [g], [t]), cube), EPSILON).advantage
        for g, t in zip(groups, target, strict=True)
    ]
    np.testing.assert_allclose(together.advantage, np.concatenate(alone), atol=1e-6)


def test_block_and_code_of_a_step_share_its_advantage_and_the_length_of_both(
    cube: Catalog,
) -> None:
    judged = add_step_rewards(thinking(cube, [4, 3]), cube)
    credit, trees = ESTIMATORS["sapo"](judged, EPSILON), judged.trees
    assert credit.advantage.shape == (7, 6)
    np.testing.assert_array_equal(credit.advantage[:, :3], credit.advantage[:, 3:])
    for i, path in enumerate(trees.paths()):
        tokens = np.diff(trees.token_start)[path]
        for k in range(3):
            share = 1 / (7 * 3 * (tokens[k] + tokens[k + 3]))
            np.testing.assert_allclose(credit.weight[i, [k, k + 3]], share, rtol=1e-6)
    # Whatever the lengths, a candidate weighs 1 / N in all.
    total = (credit.weight * np.diff(trees.token_start)[trees.paths()]).sum()
    assert total == pytest.approx(1)


def test_a_sample_with_a_wrong_number_of_blocks_earns_nothing(cube: Catalog) -> None:
    raw = thinking(cube, [3, 3], missing=1)
    formed = raw.trees.well_formed(3)
    assert formed.sum() == 5
    judged = add_step_rewards(raw, cube)
    assert judged.step_reward is not None
    assert not judged.step_reward[~formed].any()
    assert not judged.reward[~formed].any()
    path = judged.trees.paths()
    assert (path[~formed] >= 0).sum() == 5
    credit = ESTIMATORS["sapo"](judged, EPSILON)
    assert credit.weight[~formed][0, 2] == 0
    assert credit.weight[~formed][0, 5] == pytest.approx(1 / (6 * 3))
    config = LearnerConfig.model_validate({"estimator": "sapo", "sapo": {"format_weight": 0.5}})
    step, form = compute_advantages(judged, config)
    np.testing.assert_allclose(form.weight, ESTIMATORS["group"](judged, EPSILON).weight / 2)
    assert (form.advantage[~formed][path[~formed] >= 0] < 0).all()
    first_group = form.advantage[judged.trees.prompt_of_candidate == 0, 0]
    assert np.unique(np.abs(first_group) > 0).size == 1
    assert (step.weight[formed] > 0).all()
    assert np.isfinite(form.advantage).all()


def test_switches_act_on_codes_alone(cube: Catalog) -> None:
    judged = add_step_rewards(thinking(cube, [5]), cube)
    whole = ESTIMATORS["sapo"](judged, EPSILON)
    settings = {"estimator": "sapo", "std_epsilon": EPSILON}

    def switched(**step: float) -> np.ndarray:
        (credit,) = compute_advantages(
            judged, LearnerConfig.model_validate(settings | {"sapo": step})
        )
        return credit.advantage * credit.weight

    plain = whole.advantage * whole.weight
    np.testing.assert_array_equal(switched(), plain)
    alone, heavy = switched(think_only=True), switched(sid_token_weight=4)
    np.testing.assert_array_equal(alone[:, :3], plain[:, :3])
    assert not alone[:, 3:].any()
    np.testing.assert_array_equal(heavy[:, :3], plain[:, :3])
    np.testing.assert_allclose(heavy[:, 3:], 4 * plain[:, 3:], rtol=1e-6)


@pytest.mark.parametrize("codes", [1, 3])
def test_trees_of_thoughts_hold_each_sample_whole(cube: Catalog, codes: int) -> None:
    trees = thinking(cube, [3, 1, 2], codes=codes).trees
    trie = cube.trie
    assert trees.node_start.tolist() == sorted({*trees.node_start.tolist()})
    assert (trees.parent[trees.step > 0] < np.flatnonzero(trees.step > 0)).all()
    assert np.diff(trees.candidate_start).tolist() == [3 * codes, codes, 2 * codes]
    for i, path in enumerate(trees.paths()):
        assert (trees.state[path[:3]] == SearchTrees.FREE_TEXT).all()
        assert (
            trees.state[path[3:]].tolist()
            == trie.path(trie.leaf_node[trees.leaf[i : i + 1]])[0].tolist()
        )
        spans = [trees.logprob[trees.token_start[n] : trees.token_start[n + 1]] for n in path]
        assert trees.score[i] == pytest.approx(sum(s.sum() for s in spans), abs=1e-4)
    # Codes are shared below one thought, and never across two.
    blocks = trees.paths()[:, 2]
    for first in np.unique(blocks):
        below = trees.paths()[blocks == first, 3:]
        others = trees.paths()[blocks != first, 3:]
        assert not np.isin(below, others).any()


@pytest.mark.parametrize("codes", [1, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_thinking_groups_have_the_loss_and_gradients_of_flat_ones(
    cube: Catalog, codes: int, temperature: float
) -> None:
    judged = add_step_rewards(thinking(cube, [4, 2, 3], codes=codes, missing=2), cube)
    config = LearnerConfig.model_validate({"estimator": "sapo", "sapo": {"format_weight": 0.3}})
    credits = compute_advantages(judged, config)
    results: list[tuple[float, float, list[Tensor]]] = []
    layouts: list[Callable[..., object]] = [pack, flatten]
    for layout in layouts:
        model, tokenizer = tiny_policy(cube)
        batch = layout(judged, credits, tokenizer)
        tensors = to_tensors(batch)  # pyright: ignore
        logprob, entropy = choice_logprobs(model, tensors, tokenizer, temperature=temperature)
        reference = logprob.detach() - 0.1
        value, parts = policy_loss(
            logprob, entropy, reference, tensors,
            LearnerConfig.model_validate(
                {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 3.0, "kl": {"weight": 0.01}}
            ),
        )  # fmt: skip
        assert 0 < parts.clipped < parts.choices
        value.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append((float(value.detach()), float(parts.choices), gradients))
    (packed_loss, few, a), (flat_loss, many, b) = results
    assert packed_loss == pytest.approx(flat_loss, rel=1e-5, abs=1e-6)
    assert few < many if codes > 1 else few == many
    for packed, flat in zip(a, b, strict=True):
        torch.testing.assert_close(packed, flat, rtol=1e-4, atol=1e-6)


def test_a_prompt_is_read_once_for_all_its_samples(cube: Catalog) -> None:
    judged = add_step_rewards(thinking(cube, [4]), cube)
    tokenizer = tiny_policy(cube)[1]
    credits = compute_advantages(judged, LearnerConfig(estimator="sapo"))
    packed = pack(judged, credits, tokenizer)
    flat = flatten(judged, credits, tokenizer)
    prompt = len(judged.trees.prompts.token)
    assert flat.forward_tokens - packed.forward_tokens == 3 * prompt
    forced = judged.trees.forced
    tokens = judged.trees.token_start[-1]
    assert len(packed.row) == tokens - forced.sum()
