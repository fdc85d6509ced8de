"""Test value targets and loss against worked examples and candidate-by-candidate references."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from learner import checkpoint
from learner.advantage.estimators import ESTIMATORS
from learner.batch.microbatch import micro_batches, shard
from learner.batch.pack import pack
from learner.logprobs import to_tensors
from learner.trainer import Trainer
from learner.tree_states import tree_mask
from learner.value import state_values, value_loss
from orchard.arrays import map_arrays
from orchard.catalog.catalog import Catalog, from_codes
from orchard.policy import value_head
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.policy.model import hidden_states
from orchard.policy.value_head import ValueHead
from orchard.policy.weights import digest, snapshot
from orchard.settings import LearnerConfig, ValueConfig
from orchard.testing import tiny_policy, tiny_prompts
from orchard.types import PolicyVersion, ScoredTrees, TrainBatch, ValueTargets
from rewards.values import node_rewards, outcome_rewards
from rollout.engine.torch import TorchEngine
from rollout.search.beam import beam
from rollout.search_trees import build_search_trees
from tests.fixtures.trainers import save_checkpoint

Grow = Callable[..., ScoredTrees]
WEIGHT, GAMMA = (0.3, 0.5, 1.0), 0.99
BRISK = LearnerConfig(lr=3e-3, warmup=0.0, final_lr=1.0, grad_clip=1.0, value=ValueConfig(lr=3e-3))


def packed(scored: ScoredTrees, catalog: Catalog, reward: np.ndarray | None = None) -> TrainBatch:
    if reward is None:
        reward = node_rewards(scored.trees, catalog, level_weight=WEIGHT)
    credits = [ESTIMATORS["group"](scored, 1e-4)]
    tokenizer = tiny_policy(catalog)[1]
    return pack(replace(scored, node_reward=reward), credits, tokenizer, discount=GAMMA)


def tensors(batch: TrainBatch) -> ValueTargets[Tensor]:
    states = to_tensors(batch).values
    assert states is not None
    return states


def paths(scored: ScoredTrees) -> list[list[int]]:
    """List the nodes of each candidate from step 1 on."""
    return [[int(n) for n in row if n >= 0] for row in scored.trees.paths()]


def by_node(scored: ScoredTrees, states: Sequence[float]) -> dict[int, float]:
    """Map tree nodes to one number per state: states are the non-root nodes, in order."""
    return dict(zip(np.flatnonzero(scored.trees.step > 0).tolist(), states, strict=True))


def policy_with_head(catalog: Catalog, *, seed: int = 0) -> tuple[PreTrainedModel, ItemTokenizer]:
    """Return a policy whose value head is far from constant."""
    model, tokenizer = tiny_policy(catalog, seed=seed)
    value_head.attach(model, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.get_submodule(value_head.NAME).parameters():
        parameter.data.normal_(0.0, 0.3, generator=draw)
    return model, tokenizer


def test_step_rewards_compare_the_mean_embedding_of_a_bucket_with_the_target() -> None:
    catalog = from_codes([[0, 0, 0], [0, 1, 0], [0, 1, 1]], level_size=(2, 2, 2))
    model, tokenizer = tiny_policy(catalog)
    version = PolicyVersion(step=0, digest="")
    prompts = replace(tiny_prompts(catalog, [2]), target=np.array([0]))
    candidates = beam(TorchEngine(model, tokenizer, version), prompts, width=3)
    trees = build_search_trees(prompts, candidates, tokenizer, version)
    # The bucket of (0, 1) points along (.8, .6), its first member along (.6, .8).
    embedding = np.array([[1, 0], [0.6, 0.8], [1, 0.4]], np.float32)
    reward = node_rewards(trees, catalog, level_weight=WEIGHT, embedding=embedding)
    trie = catalog.trie
    of = {tuple(trie.path(torch.tensor([n]))[0].tolist()): r
          for n, r in zip(trees.state.tolist(), reward, strict=True)}  # fmt: skip
    target, other = trie.path(trie.leaf_node[:2]).tolist()
    assert of[(target[0], -1, -1)] == pytest.approx(0.3)
    assert of[(target[0], target[1], -1)] == pytest.approx(0.5)
    assert of[tuple(target)] == pytest.approx(1.0)
    assert of[(other[0], other[1], -1)] == pytest.approx(-0.1)
    assert of[tuple(other)] == pytest.approx(-0.4)
    codes = node_rewards(trees, catalog, level_weight=WEIGHT)
    assert codes[trees.state == other[1]] == pytest.approx(-0.25)  # one code of two agrees
    assert codes[trees.state == other[2]] == pytest.approx(-2 / 3)


def test_outcomes_equal_the_worked_example(score_leaves: Grow, catalog: Catalog) -> None:
    leaf = int(np.flatnonzero((catalog.trie.path(catalog.trie.leaf_node) >= 0).all(1))[0])
    scored = score_leaves([[leaf]])
    batch = packed(scored, catalog, np.array([0, 0.3, -0.1, -0.4], np.float32))
    assert batch.values is not None
    np.testing.assert_allclose(batch.values.outcome, [-0.1910, -0.496, -0.4], atol=1e-4)


def test_parts_of_the_reward_are_earned_where_a_candidate_ends(
    score_leaves: Grow, catalog: Catalog
) -> None:
    scored = score_leaves([[0, 3, 3], [2]])
    parts = {
        "rule": np.array([1, 0, 0, 1], np.float32),
        "transition": np.array([-1, 2, 4, -3], np.float32),
        "ranking": np.full(4, 9, np.float32),
    }
    scored = replace(scored, parts=parts)
    earned = outcome_rewards(scored, {"rule": 1.0, "transition": 0.5})
    ends = scored.trees.candidate
    np.testing.assert_allclose(earned[ends], [0.5, 1.5, 1.5, -0.5])  # the pair has its mean
    assert not earned[np.setdiff1d(np.arange(len(earned)), ends)].any()
    foretold = packed(scored, catalog, earned).values
    assert foretold is not None
    inner = by_node(scored, foretold.outcome.tolist())
    first, *_, last = paths(scored)[3]
    depth = int(scored.trees.step[last])
    assert inner[first] == pytest.approx(-0.5 * GAMMA ** (depth - 1))


@pytest.mark.parametrize("target", ["td", "monte_carlo"])
def test_the_loss_is_the_mean_over_the_states_of_all_candidates(
    score_random: Grow, catalog: Catalog, target: str
) -> None:
    scored = score_random([5, 3, 1])
    batch = packed(scored, catalog)
    states = tensors(batch)
    guess = torch.randn(len(states.row), requires_grad=True)
    loss = value_loss(guess, states, discount=GAMMA, target=target)
    reward = node_rewards(scored.trees, catalog, level_weight=WEIGHT)
    mine = torch.tensor(guess.tolist(), requires_grad=True)
    at = by_node(scored, list(mine))
    errors = []
    for path in paths(scored):
        for step, node in enumerate(path):
            if target == "td":
                follows = at[path[step + 1]].detach() if step + 1 < len(path) else 0
                wanted = reward[node] + GAMMA * follows
            else:
                wanted = sum(GAMMA**later * reward[n] for later, n in enumerate(path[step:]))
            errors.append((at[node] - wanted) ** 2)
    expected = torch.stack(errors).mean()
    loss.backward()
    expected.backward()
    assert torch.allclose(guess.grad, mine.grad, atol=1e-5)
    if target == "td":  # averaged first, outcomes lose a constant: their spread within a state
        assert torch.isclose(loss, expected, atol=1e-5)


def test_losses_of_shards_and_micro_batches_add_up(score_random: Grow, catalog: Catalog) -> None:
    model, _ = policy_with_head(catalog)

    def loss(batch: TrainBatch) -> float:
        part = to_tensors(batch)
        assert part.values is not None
        visible = tree_mask(part.subtree_end)
        hidden = hidden_states(model, part.token, part.position, visible)
        guess = state_values(model.get_submodule(value_head.NAME), hidden, part.values)
        return value_loss(guess, part.values, discount=GAMMA, target="td").item()

    whole = packed(score_random([5, 3, 1, 4]), catalog)
    halves = [shard(whole, rank, 2) for rank in range(2)]
    parts = [part for half in halves for part in micro_batches(half, 30)]
    assert len(parts) > 2
    assert sum(loss(part) for part in parts) == pytest.approx(loss(whole), abs=1e-5)


def test_a_state_is_worth_the_same_in_a_tree_as_in_a_sequence_that_ends_there(
    score_random: Grow, catalog: Catalog
) -> None:
    model, _ = policy_with_head(catalog)
    head, scored = model.get_submodule(value_head.NAME), score_random([6, 4])
    assert isinstance(head, ValueHead)
    batch, trees = to_tensors(packed(scored, catalog)), scored.trees
    assert batch.values is not None
    visible = tree_mask(batch.subtree_end)
    hidden = hidden_states(model, batch.token, batch.position, visible)
    found = by_node(scored, state_values(head, hidden, batch.values).tolist())
    rows = np.split(trees.prompts.token, trees.prompts.token_start[1:-1])
    for candidate, path in enumerate(paths(scored)):
        prompt = rows[trees.prompt_of_candidate[candidate]].tolist()
        for depth in range(1, len(path) + 1):
            codes = trees.token[trees.token_start[path[:depth]]].tolist()
            token = torch.tensor([prompt + codes])
            slots = torch.arange(token.shape[1])
            seen = hidden_states(model, token, slots[None], (slots <= slots[:, None])[None])[0]
            alone = head(seen, slots[None, -depth - 1 :]).item()
            assert found[path[depth - 1]] == pytest.approx(alone, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["td", "monte_carlo"])
def test_the_head_learns_what_its_states_are_worth(
    score_random: Grow, catalog: Catalog, target: str
) -> None:
    model, tokenizer = tiny_policy(catalog)
    value_head.attach(model, seed=0)
    config = BRISK.model_copy(update={"value": ValueConfig(lr=3e-3, target=target)})
    trainer = Trainer(model, tokenizer, config, total_steps=100)
    # One candidate to a group: what follows a state is certain, and its error can vanish.
    batch = packed(score_random([1] * 6), catalog)
    losses = [trainer.rl_step(batch)["value_loss"] for _ in range(40)]
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("detach", [True, False])
def test_the_head_moves_the_rest_of_the_policy_only_if_told_to(
    score_random: Grow, catalog: Catalog, detach: bool
) -> None:
    scored = score_random([5, 3])
    config = BRISK.model_copy(update={"value": ValueConfig(weight=3.0, detach=detach)})
    learners = []
    for make in (policy_with_head, tiny_policy):
        model, tokenizer = make(catalog)
        trainer = Trainer(model, tokenizer, config, total_steps=100)
        trainer.rl_step(packed(scored, catalog))
        learners.append(snapshot(trainer.policy))
    with_head, without = learners
    apart = max(np.abs(with_head[name] - without[name]).max() for name in without)
    assert (apart < 1e-5) == detach


@pytest.mark.slow
def test_a_resumed_learner_with_a_head_continues_bit_for_bit(
    score_random: Grow, catalog: Catalog, tmp_path: Path
) -> None:
    batches = [packed(score_random([4, 3], seed=seed), catalog) for seed in range(4)]

    def learner() -> Trainer:
        model, tokenizer = policy_with_head(catalog)
        return Trainer(model, tokenizer, BRISK, total_steps=100)

    straight, first, second = learner(), learner(), learner()
    for batch in batches:
        straight.rl_step(batch)
    for batch in batches[:2]:
        first.rl_step(batch)
    save_checkpoint(first, tmp_path, number=2, catalog=catalog.digest)
    checkpoint.load(second, tmp_path, catalog=catalog.digest)
    for batch in batches[2:]:
        second.rl_step(batch)
    assert digest(snapshot(second.policy)) == digest(snapshot(straight.policy))


def test_a_part_without_states_still_takes_part_in_the_backward_pass(
    score_random: Grow, catalog: Catalog
) -> None:
    model, _ = policy_with_head(catalog)
    head = model.get_submodule(value_head.NAME)
    assert isinstance(head, ValueHead)
    states = tensors(packed(score_random([2]), catalog))
    none = map_arrays(states, lambda array: array[:0])
    guess = state_values(head, torch.randn(1, 5, head.width), none)
    value_loss(guess, none, discount=GAMMA, target="td").backward()
    gradients = [parameter.grad for parameter in head.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_an_average_keeps_its_own_head(catalog: Catalog) -> None:
    model, tokenizer = policy_with_head(catalog)
    trainer = Trainer(model, tokenizer, LearnerConfig(), total_steps=9, ema_decay=0.9)
    assert snapshot(trainer.eval_policy).keys() == snapshot(trainer.policy).keys()
    assert trainer.eval_policy is not trainer.policy
