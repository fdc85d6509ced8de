"""Test packing against a plain-Python layout and one ordinary forward pass per candidate."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from learner.advantage.estimators import ESTIMATORS
from learner.batch.pack import flatten, pack
from learner.logprobs import choice_logprobs, to_tensors
from learner.tree_states import tree_mask
from orchard import ragged
from orchard.catalog import catalog as catalogs
from orchard.catalog.catalog import Catalog
from orchard.errors import CatalogError
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.testing import brute_force, tiny_catalog, tiny_policy, tiny_prompts
from orchard.types import Advantages, Cost, PolicyVersion, ScoredTrees, SearchTrees

Grow = Callable[..., ScoredTrees]
Policy = tuple[PreTrainedModel, ItemTokenizer]
SIZES = (4, 1, 7, 12, 2)


def credits_of(scored: ScoredTrees) -> list[Advantages]:
    """Return two credits whose signs disagree on some candidates."""
    flipped = replace(scored, reward=np.roll(scored.reward, 1))
    return [ESTIMATORS["group"](scored, 1e-4), ESTIMATORS["drgrpo"](flipped, 1e-4)]


def lay_out(trees: SearchTrees, row: int) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """List the paths of a row's nodes that need a slot and of its choices, by definition."""
    nodes = range(trees.node_start[row], trees.node_start[row + 1])
    path: dict[int, tuple[int, ...]] = {nodes[0]: ()}
    for node in nodes[1:]:
        path[node] = (*path[int(trees.parent[node])], int(trees.state[node]))
    choice = [path[n] for n in nodes[1:] if not trees.forced[trees.token_start[n]]]
    above = [path[n] for n in nodes[1:] if any(path[n] == c[: len(path[n])] for c in choice
             if len(c) > len(path[n]))]  # fmt: skip
    return sorted(above), sorted(choice)


def test_rows_hold_the_prompt_and_in_preorder_every_node_above_a_choice(
    catalog: Catalog, policy: Policy, score_random: Grow
) -> None:
    scored = score_random(SIZES)
    trees, tokenizer = scored.trees, policy[1]
    batch = pack(scored, credits_of(scored), tokenizer)
    visible = tree_mask(to_tensors(batch).subtree_end).numpy()
    for row in range(len(trees)):
        prompt = trees.prompts.select(np.array([row])).token
        above, choice = lay_out(trees, row)
        last = torch.tensor([path[-1] for path in above], dtype=torch.long)
        tokens = [*prompt, *tokenizer.token_of(last).tolist()] if choice else []
        places = [*range(len(prompt)), *(len(prompt) + len(path) - 1 for path in above)]
        assert batch.token[row, : len(tokens)].tolist() == tokens
        assert batch.position[row, : len(tokens)].tolist() == places[: len(tokens)]
        assert not visible[row, len(tokens) :].any()
        for slot in range(len(tokens)):
            at = above[slot - len(prompt)] if slot >= len(prompt) else ()
            sees = set(range(len(prompt) if at else slot + 1))
            sees |= {len(prompt) + above.index(at[:i]) for i in range(1, len(at) + 1)}
            assert set(np.flatnonzero(visible[row, slot]).tolist()) == sees
    assert batch.forward_tokens == (visible.sum(2) > 0).sum()


def test_choices_are_the_unforced_codes_with_the_summed_credit_of_their_candidates(
    catalog: Catalog, policy: Policy, score_random: Grow
) -> None:
    scored = score_random(SIZES)
    trees, credits = scored.trees, credits_of(scored)
    batch = pack(scored, credits, policy[1])
    paths, owner = trees.paths(), trees.prompt_of_candidate
    actual: list[tuple[int, ...]] = []
    for choice, (row, edge) in enumerate(zip(batch.row, batch.chosen, strict=True)):
        through = np.argwhere((trees.state[paths] == edge) & (paths >= 0) & (owner[:, None] == row))
        earned = [c.advantage[i, k] * c.weight[i, k] for c in credits for i, k in through]
        assert batch.advantage_pos[choice] == pytest.approx(
            sum(max(a, 0) for a in earned), rel=1e-5
        )
        assert batch.advantage_neg[choice] == pytest.approx(
            sum(min(a, 0) for a in earned), rel=1e-5
        )
        weight = sum(credits[0].weight[i, k] for i, k in through)
        assert batch.kl_weight[choice] == pytest.approx(weight, rel=1e-5)
        assert batch.behaviour_logprob[choice] == trees.logprob[
            trees.token_start[paths[*through[0]]]
        ]  # fmt: skip
        above = [int(n) for n in catalog.trie.path(torch.tensor([edge]))[0] if n >= 0]
        assert batch.state[choice] == ([0, *above])[-2]
        actual.append((int(row), *above))
    expected = [(row, *path) for row in range(len(trees)) for path in lay_out(trees, row)[1]]
    assert sorted(actual) == sorted(expected)
    assert (np.minimum(batch.advantage_pos, -batch.advantage_neg) > 0).any()


@pytest.mark.slow
@pytest.mark.parametrize("layout", [pack, flatten])
def test_choice_logprobs_add_up_to_those_of_an_ordinary_forward_pass_per_leaf(
    catalog: Catalog, policy: Policy, score_random: Grow, layout: Callable[..., Any]
) -> None:
    model, tokenizer = policy
    scored = score_random(SIZES)
    trees = scored.trees
    batch = layout(scored, credits_of(scored), tokenizer)
    with torch.no_grad():
        logprob, _ = choice_logprobs(model, to_tensors(batch), tokenizer)
    paths = trees.paths()
    for i, prompt in enumerate(trees.prompt_of_candidate):
        row = prompt if layout is pack else i
        edges = trees.state[paths[i][paths[i] >= 0]]
        total = logprob.numpy()[(batch.row == row) & np.isin(batch.chosen, edges)].sum()
        tokens = trees.prompts.select(np.array([prompt])).token
        expected = brute_force(model, tokenizer, tokens)[trees.leaf[i]]
        assert total == pytest.approx(expected, abs=1e-5)


def test_flat_rows_hold_one_candidate_each(
    catalog: Catalog, policy: Policy, score_random: Grow
) -> None:
    scored = score_random(SIZES)
    credits = credits_of(scored)
    flat = flatten(scored, credits, policy[1])
    packed = pack(scored, credits, policy[1])
    assert len(flat.token) == sum(SIZES)
    trees = scored.trees
    prompt = np.diff(trees.prompts.token_start)[trees.prompt_of_candidate]
    assert flat.flat_tokens == packed.flat_tokens == prompt.sum() + (trees.paths() >= 0).sum()
    assert packed.forward_tokens < flat.forward_tokens < flat.flat_tokens
    for name in ("advantage_pos", "advantage_neg", "kl_weight"):
        assert getattr(flat, name).sum() == pytest.approx(getattr(packed, name).sum(), rel=1e-4)


def test_a_tree_without_a_choice_is_a_row_of_padding(
    catalog: Catalog, policy: Policy, score_leaves: Grow
) -> None:
    scored = score_leaves([[0, 1, 2], [3, 3]])
    trees = scored.trees
    second = trees.prompt_of_node[ragged.row_of(trees.token_start)] == 1
    scored = replace(scored, trees=replace(trees, forced=trees.forced | second))
    batch = pack(scored, credits_of(scored), policy[1])
    assert not batch.subtree_end[1].any()
    assert (batch.row == 0).all()


@pytest.mark.parametrize("values", [False, True])
def test_a_tree_without_candidates_is_a_row_of_padding(
    catalog: Catalog, policy: Policy, score_leaves: Grow, *, values: bool
) -> None:
    scored = score_leaves([[0, 1, 2], []])
    node_reward = np.zeros(len(scored.trees.step), np.float32) if values else None
    scored = replace(scored, node_reward=node_reward)
    batch = pack(scored, credits_of(scored), policy[1])
    assert batch.subtree_end[0].any()
    assert not batch.subtree_end[1].any()
    only = score_leaves([[]])
    nothing = pack(only, credits_of(only), policy[1])
    assert nothing.token.tolist() == [[policy[1].pad]]


def thoughts(catalog: Catalog) -> ScoredTrees:
    """Two candidates: a thought (one has an injected token), then two codes in a span and a code,
    or all three in one span."""
    trees = SearchTrees(
        prompts=tiny_prompts(catalog, [2]),
        policy=PolicyVersion(step=0, digest="0" * 64),
        catalog=catalog.digest,
        node_start=np.array([0, 6]),
        parent=np.array([-1, 0, 1, 2, 0, 4]),
        step=np.array([0, 1, 2, 3, 1, 2], np.int32),
        state=np.array([0, SearchTrees.FREE_TEXT, 3, 7, SearchTrees.FREE_TEXT, 14]),
        token=np.array([3, 8, 5, 3, 5, 7, 4, 7, 4, 6, 8], np.int32),
        token_start=np.array([0, 0, 3, 5, 6, 8, 11]),
        logprob=np.zeros(11, np.float32),
        forced=np.arange(11) == 1,
        candidate=np.array([3, 5]),
        candidate_start=np.array([0, 2]),
        leaf=np.array([0, 7]),
        score=np.zeros(2, np.float32),
        cost=Cost(),
    )
    return ScoredTrees(trees=trees, reward=np.array([1, 0], np.float32), parts={})


def test_spans_of_text_and_of_several_codes_are_predicted_token_by_token() -> None:
    catalog = catalogs.from_codes(list(product((0, 1), repeat=3)))
    model, tokenizer = tiny_policy(catalog)
    scored = thoughts(catalog)
    prompt = scored.trees.prompts.token.tolist()
    batch = pack(scored, credits_of(scored), tokenizer)
    assert batch.forward_tokens == len(prompt) + 9
    with torch.no_grad():
        got = choice_logprobs(model, to_tensors(batch), tokenizer)
    tokens, codes = list(range(tokenizer.size)), ([3, 4], [5, 6], [7, 8])
    cases: list[tuple[list[int], list[int], int]] = [
        ([], tokens, 3), ([3, 8], tokens, 5),
        ([3, 8, 5], codes[0], 3), ([3, 8, 5, 3], codes[1], 5), ([3, 8, 5, 3, 5], codes[2], 7),
        ([], tokens, 4), ([4], tokens, 7),
        ([4, 7], codes[0], 4), ([4, 7, 4], codes[1], 6), ([4, 7, 4, 6], codes[2], 8),
    ]  # fmt: skip
    for (before, legal, token), logprob, entropy in zip(cases, *got, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + before])).logits[0, -1, legal]
        expected = logits.log_softmax(0)
        assert logprob.item() == pytest.approx(expected[legal.index(token)].item(), abs=1e-5)
        assert entropy.item() == pytest.approx(-(expected.exp() @ expected).item(), abs=1e-5)


def test_trees_of_another_catalog_are_refused(
    catalog: Catalog, policy: Policy, score_random: Grow
) -> None:
    scored, other = score_random([2]), tiny_catalog(seed=9)
    both = f"catalog {catalog.digest[:12]}, the learner holds {other.digest[:12]}; .* same items"
    with pytest.raises(CatalogError, match=both):
        pack(scored, credits_of(scored), policy[1].with_catalog(other))
