"""Pack scored trees into training rows: each token once, however many candidates share it.

A row is the prompt followed, in preorder, by the tree's tokens that some later choice is
conditioned on. Forced tokens at the end of a branch and the last choice of each candidate are
predicted or known but never read, so they take no slot; nor do candidates without any weight, which
add nothing to the loss. `flatten` lays out the same choices with one candidate per row, as a
trainer without trees does.

Shapes:  B rows   N nodes   M tokens of all nodes   C candidates   E choices
         K steps of the longest candidate   D codes of the longest target   Z learned target codes
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from learner.advantage.estimators import candidate_lengths, compute_advantages
from learner.batch.layout import (
    Layout,
    dense_tables,
    last_slots,
    lay_out,
    query_slots,
    trie_edges,
)
from learner.batch.target_paths import add_target_paths, target_weights
from learner.value import value_targets
from orchard import ragged
from orchard.catalog.trie import Trie
from orchard.errors import CatalogError
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.settings import LearnerConfig
from orchard.targets import CodeTargets
from orchard.types import Advantages, ScoredTrees, SearchTrees, SequenceTargets, TrainBatch


def make_batch(scored: ScoredTrees, tokenizer: ItemTokenizer, config: LearnerConfig) -> TrainBatch:
    """Compute the configured advantages of scored trees and pack both into a batch."""
    return pack(
        scored,
        compute_advantages(scored, config),
        tokenizer,
        discount=config.value.discount,
        sequence_ratio=config.ratio == "sequence",
        target_weight=target_weights(scored.trees, tokenizer, config),
    )


def pack(
    scored: ScoredTrees,
    credits: Sequence[Advantages],
    tokenizer: ItemTokenizer,
    *,
    discount: float = 1.0,
    sequence_ratio: bool = False,
    target_weight: Float64[np.ndarray, "B D"] | None = None,
) -> TrainBatch:
    """Pack one tree per row; a tree without any choice becomes a row of padding.

    Every token of a step carries that step's credit. Several credits add up; the KL weight of a
    choice is the weight of the first credit, summed over the candidates through it. Where nodes
    have rewards, the batch also holds the discounted targets of the value head; every token then
    takes a slot, because each state has a value. With `sequence_ratio` it also holds the choices
    that make up each candidate and the advantages of whole candidates. With `target_weight`, the
    weights of the codes of each prompt's target, it also holds those codes.

    Raises:
        CatalogError: the trees were grown on another catalog.
    """
    trees, catalog = scored.trees, tokenizer.catalog
    if trees.catalog != catalog.digest:
        raise CatalogError(
            f"the trees were grown on catalog {trees.catalog[:12]}, the learner holds "
            f"{catalog.digest[:12]}; start both from the same items file"
        )
    # [Z] flat token index and weight of each code of a target to be learned
    target, weight = np.zeros(0, np.int64), np.zeros(0)
    if target_weight is not None:
        paths = add_target_paths(scored, tokenizer, target_weight > 0)
        scored, trees = paths.scored, paths.scored.trees
        learned = (target_weight > 0) & (paths.node >= 0)
        target, weight = trees.token_start[paths.node[learned]], target_weight[learned]
    node_reward = scored.node_reward
    # [C] mask of the candidates with a weight at some step; the value head learns from all
    used = np.logical_or.reduce([(credit.weight != 0).any(1) for credit in credits])
    # [C, K] node of each candidate at each step, NO_PARENT past its end
    path = trees.paths()
    # [N] number of candidates with a weight through each node
    num_through = np.bincount(path[used][path[used] >= 0], minlength=len(trees.step))
    node_of_token = ragged.row_of(trees.token_start)
    # [E] flat token index of each choice: on some candidate's path and not forced
    choice = np.flatnonzero((num_through[node_of_token] > 0) & ~trees.forced)
    read = np.union1d(choice, target)
    layout = lay_out(trees, node_of_token, read, keep_all=node_reward is not None)
    node_of_choice = node_of_token[choice]
    state, edge = trie_edges(trees, node_of_choice, choice, catalog.trie)
    # [C, K] weighted advantage of each credit
    weighted = [credit.advantage * credit.weight for credit in credits]
    length = candidate_lengths(trees)
    prompt_length = np.diff(trees.prompts.token_start)[trees.prompt_of_candidate]
    num_nodes = len(num_through)
    return TrainBatch(
        **dense_tables(trees, layout, tokenizer.pad),
        row=trees.prompt_of_node[node_of_choice],
        query_slot=query_slots(trees, layout, node_of_choice, choice).astype(np.int32),
        state=state,
        chosen=edge,
        behaviour_logprob=trees.logprob[choice],
        advantage_pos=_node_sums(path, [a.clip(min=0) for a in weighted], num_nodes)[
            node_of_choice
        ],
        advantage_neg=_node_sums(path, [a.clip(max=0) for a in weighted], num_nodes)[
            node_of_choice
        ],
        kl_weight=_node_sums(path, [credits[0].weight], num_nodes)[node_of_choice],
        forward_tokens=int(layout.length.sum()),
        flat_tokens=int((length + prompt_length)[used].sum()),
        policy=trees.policy,
        catalog=trees.catalog,
        values=None
        if node_reward is None
        else value_targets(trees, node_reward, last_slots(trees, layout), discount=discount),
        sequences=_sequence_targets(trees, choice, weighted, used) if sequence_ratio else None,
        codes=None
        if target_weight is None
        else _code_targets(trees, layout, node_of_token[target], target, weight, catalog.trie),
    )


def flatten(
    scored: ScoredTrees,
    credits: Sequence[Advantages],
    tokenizer: ItemTokenizer,
    *,
    sequence_ratio: bool = False,
) -> TrainBatch:
    """Pack one candidate per row, prompt included: the batch of `pack` with nothing shared."""
    chains = replace(scored, trees=_unshare(scored.trees), node_reward=None)
    return pack(chains, credits, tokenizer, sequence_ratio=sequence_ratio)


def _code_targets(
    trees: SearchTrees,
    layout: Layout,
    node: Int64[np.ndarray, " Z"],
    token: Int64[np.ndarray, " Z"],
    weight: Float64[np.ndarray, " Z"],
    trie: Trie,
) -> CodeTargets:
    """Describe codes as choices are: by the slot that predicts each and by its trie edge."""
    state, edge = trie_edges(trees, node, token, trie)
    return CodeTargets(
        row=trees.prompt_of_node[node],
        query_slot=query_slots(trees, layout, node, token).astype(np.int32),
        state=state,
        chosen=edge,
        weight=weight.astype(np.float32),
    )


def _sequence_targets(
    trees: SearchTrees,
    choice: Int64[np.ndarray, " E"],
    weighted: Sequence[Float32[np.ndarray, "C K"]],
    used: Bool[np.ndarray, " C"],
) -> SequenceTargets:
    """List the choices on each used candidate's path and sum its weighted advantage."""
    path, span = trees.paths()[used], np.diff(trees.token_start)
    inside = path >= 0
    # one entry per (candidate, node on its path)
    candidate, node = np.nonzero(inside)[0], path[inside]
    # one entry per (candidate, token on its path)
    token = ragged.ranges(trees.token_start[node], span[node])
    candidate_of_token = np.repeat(candidate, span[node])
    # [M] index of each token among the choices, -1 where it is none
    choice_index = np.full(len(trees.token), -1)
    choice_index[choice] = np.arange(len(choice))
    is_choice = choice_index[token] >= 0
    total = sum((values[used].astype(np.float64) for values in weighted), np.zeros(path.shape))
    advantage = np.where(inside, total * span[path], 0).sum(1)
    return SequenceTargets(
        row=trees.prompt_of_candidate[used],
        advantage=advantage.astype(np.float32),
        length=np.maximum(1, candidate_lengths(trees)[used]).astype(np.float32),
        choice=choice_index[token[is_choice]],
        candidate=candidate_of_token[is_choice],
    )


def _node_sums(
    path: Int64[np.ndarray, "C K"], values: Sequence[Float32[np.ndarray, "C K"]], num_nodes: int
) -> Float32[np.ndarray, " N"]:
    """Sum each node's values over the candidates through it."""
    inside = path >= 0
    total = np.zeros(num_nodes)
    for value in values:
        total += np.bincount(path[inside], weights=value[inside], minlength=num_nodes)
    return total.astype(np.float32)


def _unshare(trees: SearchTrees) -> SearchTrees:
    """Give each candidate a separate tree, a chain with a copy of its prompt."""
    prompt = trees.prompt_of_candidate
    # [C, 1 + K] root and path of each candidate, NO_PARENT past its end
    node = np.concatenate([trees.node_start[prompt][:, None], trees.paths()], axis=1)
    length = (node >= 0).sum(1)
    # old index of each new node, chain after chain
    start, nodes = ragged.starts(length), node[node >= 0]
    parent = np.arange(len(nodes)) - 1
    parent[start[:-1]] = SearchTrees.NO_PARENT
    token, token_start = ragged.take(trees.token, trees.token_start, nodes)
    return replace(
        trees,
        prompts=trees.prompts.select(prompt),
        node_start=start,
        parent=parent,
        step=trees.step[nodes],
        state=trees.state[nodes],
        token=token,
        token_start=token_start,
        value=None if trees.value is None else trees.value[nodes],
        hinted=None if trees.hinted is None else trees.hinted[prompt],
        logprob=ragged.take(trees.logprob, trees.token_start, nodes)[0],
        forced=ragged.take(trees.forced, trees.token_start, nodes)[0],
        candidate=start[1:] - 1,
        candidate_start=np.arange(len(prompt) + 1),
    )
