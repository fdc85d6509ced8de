"""Test target paths: the term of the loss against brute force, and that nothing else changes."""

from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from learner.batch.microbatch import micro_batches, shard, without_choices
from learner.batch.pack import make_batch
from learner.batch.target_paths import add_target_paths, target_weights
from learner.logprob_model import LogprobModel
from learner.logprobs import to_tensors
from orchard import ragged
from orchard.catalog.catalog import Catalog
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.settings import LearnerConfig
from orchard.testing import brute_force
from orchard.types import ScoredTrees, SearchTrees, TrainBatch

Grow = Callable[..., ScoredTrees]
Policy = tuple[PreTrainedModel, ItemTokenizer]
SIZES = [4, 1, 7, 3]
GROUPS = [[0, 1, 2, 9], [3, 4], [5], []]


def settings(**learner: object) -> LearnerConfig:
    return LearnerConfig.model_validate(learner)


def nll(batch: TrainBatch, policy: Policy, distribution: str = "trie") -> float:
    """The term that the learner adds to its loss."""
    model, tokenizer = policy
    scorer = LogprobModel(model, tokenizer, distribution)  # type: ignore[arg-type]
    with torch.no_grad():
        logprob = scorer(to_tensors(batch)).code_logprob
    assert batch.codes is not None
    assert logprob is not None
    return -float(logprob.double().numpy() @ batch.codes.weight)


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_the_anchor_is_the_mean_negative_log_probability_of_targets(
    catalog: Catalog,
    policy: Policy,
    score_random: Grow,
    score_leaves: Grow,
    groups: list[list[int]] | None,
) -> None:
    scored = score_random(SIZES) if groups is None else score_leaves(groups)
    prompts, expected = scored.trees.prompts, 0.0
    for row, item in enumerate(prompts.target):
        if groups is not None and not groups[row]:
            continue  # nothing was found, and there is no tree
        tokens = prompts.select(np.array([row])).token
        leaf = catalog.leaf_of_item[item]
        length = int((catalog.trie.path(catalog.trie.node_of(torch.tensor([leaf])))[0] >= 0).sum())
        expected -= brute_force(*policy, tokens)[leaf] / length / len(prompts)
    batch = make_batch(scored, policy[1], settings(anchor=0.3))
    assert nll(batch, policy) == pytest.approx(0.3 * expected, rel=1e-5)
    parts = [nll(part, policy) for part in micro_batches(batch, 12)]
    assert len(parts) > 1
    assert sum(parts) == pytest.approx(0.3 * expected, rel=1e-5)
    assert sum(nll(shard(batch, rank, 3), policy) for rank in range(3)) == pytest.approx(
        0.3 * expected, rel=1e-5
    )
    assert nll(without_choices(batch), policy) == 0


def test_over_the_vocabulary_forced_codes_are_learned_too(
    catalog: Catalog, policy: Policy, score_random: Grow
) -> None:
    model, tokenizer = policy
    scored = score_random(SIZES)
    prompts, expected = scored.trees.prompts, 0.0
    for row, item in enumerate(prompts.target):
        tokens = prompts.select(np.array([row])).token.tolist()
        codes = ragged.take(*tokenizer.item_tokens, np.array([item]))[0].tolist()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens + codes])).logits[0]
        logprob = logits.log_softmax(-1)
        total = sum(float(logprob[len(tokens) + k - 1, code]) for k, code in enumerate(codes))
        expected -= total / len(codes) / len(prompts)
    batch = make_batch(scored, tokenizer, settings(anchor=1.0, logprob="full"))
    assert nll(batch, policy, "full") == pytest.approx(expected, rel=1e-5)


def test_hints_are_learned_without_the_codes_below_them(
    catalog: Catalog, policy: Policy, score_random: Grow
) -> None:
    scored = score_random(SIZES)
    hinted = np.array([0, 1, 2, 1])
    scored = replace(scored, trees=replace(scored.trees, hinted=hinted))
    weights = target_weights(scored.trees, policy[1], settings(hint_weight=0.01))
    assert weights is not None
    trie, expected = catalog.trie, np.zeros_like(weights)
    for row, item in enumerate(scored.trees.prompts.target):
        path = trie.path(trie.node_of(torch.tensor([catalog.leaf_of_item[item]])))[0]
        length = int((path >= 0).sum())
        for code in range(min(hinted[row], length)):
            above = torch.tensor([0]) if code == 0 else path[code - 1 : code]
            if int(trie.num_children(above)) > 1:
                expected[row, code] = 0.01 / (len(SIZES) * length)
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    assert weights.any()
    both = target_weights(scored.trees, policy[1], settings(hint_weight=0.01, anchor=0.5))
    anchor = target_weights(scored.trees, policy[1], settings(anchor=0.5))
    assert both is not None
    assert anchor is not None
    np.testing.assert_allclose(both, anchor + weights, rtol=1e-12)


@pytest.mark.parametrize("values", [False, True])
def test_the_choices_of_the_policy_loss_stay_the_same(
    policy: Policy, score_random: Grow, *, values: bool
) -> None:
    scored = score_random(SIZES)
    if values:
        reward = np.random.default_rng(0).random(len(scored.trees.step)).astype(np.float32)
        scored = replace(scored, node_reward=reward)
    plain = make_batch(scored, policy[1], settings())
    anchored = make_batch(scored, policy[1], settings(anchor=1.0))
    assert plain.codes is None
    for name in ("row", "state", "chosen", "behaviour_logprob", "advantage_pos", "advantage_neg",
                 "kl_weight"):  # fmt: skip
        np.testing.assert_array_equal(getattr(plain, name), getattr(anchored, name))
    assert anchored.forward_tokens > plain.forward_tokens
    scorer = LogprobModel(*policy, "trie")
    with torch.no_grad():
        before, after = (scorer(to_tensors(batch)) for batch in (plain, anchored))
    torch.testing.assert_close(before.logprob, after.logprob, rtol=0, atol=1e-5)
    torch.testing.assert_close(before.entropy, after.entropy, rtol=0, atol=1e-5)
    if values:
        assert plain.values is not None
        assert anchored.values is not None
        for name in ("row", "reward", "outcome", "through", "entered", "ending"):
            np.testing.assert_array_equal(
                getattr(plain.values, name), getattr(anchored.values, name)
            )


def prefixes(trees: SearchTrees) -> list[tuple[int, ...]]:
    """Prompt and trie path of every node, by climbing."""
    found = list[tuple[int, ...]]()
    for node in range(len(trees.step)):
        path, at = list[int](), node
        while trees.parent[at] >= 0:
            path.append(int(trees.state[at]))
            at = trees.parent[at]
        found.append((int(trees.prompt_of_node[node]), *reversed(path)))
    return found


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_trees_get_the_missing_prefixes_of_their_targets_in_preorder(
    catalog: Catalog,
    policy: Policy,
    score_random: Grow,
    score_leaves: Grow,
    groups: list[list[int]] | None,
) -> None:
    scored = score_random(SIZES) if groups is None else score_leaves(groups)
    before, trie = scored.trees, catalog.trie
    depth = trie.depth
    needed = np.ones((len(before), depth), bool)
    needed[1] = False  # a prompt that needs nothing
    needed[2, 1:] = False  # one that needs its first code
    found = add_target_paths(scored, policy[1], needed)
    after, expected = found.scored.trees, set(prefixes(before))
    old = len(expected)
    for row, item in enumerate(before.prompts.target):
        path = trie.path(trie.node_of(torch.tensor([catalog.leaf_of_item[item]])))[0].tolist()
        path = [node for node in path if node >= 0]
        for k in range(1, len(path) + 1):
            if needed[row, k - 1] and np.diff(before.node_start)[row]:
                expected.add((row, *path[:k]))
                assert prefixes(after)[found.node[row, k - 1]] == (row, *path[:k])
            else:
                assert found.node[row, k - 1] == -1
    assert len(expected) > old or groups is None
    listed = prefixes(after)
    assert sorted(listed) == sorted(expected)
    # Preorder: every node follows its parent's subtree so far, and nothing interrupts a subtree.
    open_path = list[tuple[int, ...]]()
    for prefix in listed:
        while open_path and open_path[-1] != prefix[:-1]:
            open_path.pop()
        assert open_path or len(prefix) == 1
        open_path.append(prefix)
    assert [len(prefix) - 1 for prefix in listed] == after.step.tolist()
    tokens = {
        prefix: int(before.token[before.token_start[node]])
        for node, prefix in enumerate(prefixes(before))
        if len(prefix) > 1
    }
    for node, prefix in enumerate(listed):
        span = after.token[after.token_start[node] : after.token_start[node + 1]].tolist()
        if len(prefix) == 1:
            assert span == []
        else:
            token = int(policy[1].token_of(torch.tensor([prefix[-1]])))
            assert span == [tokens.get(prefix, token)]
    ends = [prefixes(before)[node] for node in before.candidate]
    assert [listed[node] for node in after.candidate] == ends


def test_trees_that_hold_their_targets_stay_as_they_are(
    catalog: Catalog, policy: Policy, score_leaves: Grow
) -> None:
    blank = score_leaves([[0], [1]])
    target = catalog.leaf_of_item[blank.trees.prompts.target]
    scored = score_leaves([[int(target[0]), 3], [int(target[1])]])
    found = add_target_paths(scored, policy[1], np.ones((2, catalog.trie.depth), bool))
    for field in fields(SearchTrees):
        value = getattr(scored.trees, field.name)
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(found.scored.trees, field.name), value)
