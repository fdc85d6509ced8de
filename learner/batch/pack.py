"""Scored trees to training rows: each token once, however many candidates share it.

A row is the prompt and, in preorder, the tree's tokens that some later choice is conditioned on.
Forced tokens at the end of a branch, and the last choice of each candidate, are predicted or known
but never read, so they take no slot. `flatten` lays the same choices out one candidate to a row,
as a trainer without trees would.

Shapes:  B rows   S slots of the widest row   N nodes   M tokens of all nodes   C candidates
         K steps of the longest candidate   E choices
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64

from learner.advantage.estimators import candidate_lengths
from learner.value import value_targets
from orchard import ragged
from orchard.catalog.trie import Trie
from orchard.errors import CatalogError
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.types import Advantages, ScoredTrees, SearchTrees, SequenceTargets, TrainBatch


def pack(
    scored: ScoredTrees,
    credits: Sequence[Advantages],
    tokenizer: ItemTokenizer,
    *,
    node_reward: Float32[np.ndarray, " N"] | None = None,
    discount: float = 1.0,
    sequence_ratio: bool = False,
) -> TrainBatch:
    """One tree per row; a tree without any choice becomes a row of padding.

    Every token of a step carries that step's credit. Several credits add up; the KL weight of a
    choice is the weight of the first credit, summed over the candidates through it. With the
    rewards of the steps into the nodes, the batch also holds, discounted, what the value head is to
    learn; every token then takes a slot, for its state has a value. With `sequence_ratio` it also
    holds which choices make up each candidate, and the advantages of whole candidates.

    Raises:
        CatalogError: the trees were grown on another catalog.
    """
    trees, catalog = scored.trees, tokenizer.catalog
    if trees.catalog != catalog.digest:
        raise CatalogError(
            f"the trees were grown on catalog {trees.catalog[:12]}, the learner holds "
            f"{catalog.digest[:12]}; start both from the same items file"
        )
    path = trees.paths()
    through = np.bincount(path[path >= 0], minlength=len(trees.step))
    node = ragged.owners(trees.token_start)
    choice = np.flatnonzero((through[node] > 0) & ~trees.forced)
    layout = _lay_out(trees, node, choice, states=node_reward is not None)
    at = node[choice]
    state, edge = _edges(trees, at, choice, catalog.trie)
    earned = [credit.advantage * credit.weight for credit in credits]
    length = candidate_lengths(trees)
    prompt_length = np.diff(trees.prompts.token_start)[trees.prompt_of_candidate]
    return TrainBatch(
        **_rows(trees, layout, tokenizer.pad),
        row=trees.prompt_of_node[at],
        query_slot=_predictors(trees, layout, at, choice).astype(np.int32),
        state=state,
        chosen=edge,
        behaviour_logprob=trees.logprob[choice],
        advantage_pos=_node_sums(path, [a.clip(min=0) for a in earned], len(through))[at],
        advantage_neg=_node_sums(path, [a.clip(max=0) for a in earned], len(through))[at],
        kl_weight=_node_sums(path, [credits[0].weight], len(through))[at],
        forward_tokens=int(layout.length.sum()),
        flat_tokens=int((length + prompt_length).sum()),
        policy=trees.policy,
        catalog=trees.catalog,
        values=None
        if node_reward is None
        else value_targets(trees, node_reward, _ends(trees, layout), discount=discount),
        sequences=_sequences(trees, choice, earned, length) if sequence_ratio else None,
    )


def flatten(
    scored: ScoredTrees,
    credits: Sequence[Advantages],
    tokenizer: ItemTokenizer,
    *,
    sequence_ratio: bool = False,
) -> TrainBatch:
    """The batch that `pack` makes with nothing shared: one candidate per row, prompt and all."""
    chains = replace(scored, trees=_unshare(scored.trees))
    return pack(chains, credits, tokenizer, sequence_ratio=sequence_ratio)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Where everything goes."""

    prompt_length: Int64[np.ndarray, " B"]
    """Slots of the prompt; 0 for a tree of which nothing is kept."""
    length: Int64[np.ndarray, " B"]
    """Slots of the row."""
    kept: Bool[np.ndarray, " M"]
    """Tokens that have a slot: those with a choice strictly below them."""
    slot: Int64[np.ndarray, " M"]
    """Of the kept tokens; meaningless for the others."""
    position: Int64[np.ndarray, " M"]
    subtree_end: Int64[np.ndarray, " M"]


def _lay_out(
    trees: SearchTrees,
    node: Int64[np.ndarray, " M"],
    choice: Int64[np.ndarray, " E"],
    *,
    states: bool,
) -> _Layout:
    """Slots in preorder, which makes every subtree of tokens a range.

    All tokens are kept where `states` are wanted, and else those that a choice is conditioned on.
    """
    end = trees.token_start[_subtree_ends(trees)][node]
    is_choice = np.zeros(len(node), np.int64)
    is_choice[choice] = 1
    seen = ragged.starts(is_choice)
    kept = seen[end] > seen[1:]
    first = trees.token_start[trees.node_start]
    is_read = seen[first[1:]] > seen[first[:-1]]
    if states:
        kept, is_read = np.ones_like(kept), first[1:] > first[:-1]
    prompt_length = np.diff(trees.prompts.token_start) * is_read
    seats = ragged.starts(kept.astype(np.int64))
    prompt = trees.prompt_of_node[node]
    shift = prompt_length[prompt] - seats[first[prompt]]
    depth = _tokens_above(trees)[node] + ragged.places(trees.token_start)
    return _Layout(
        prompt_length=prompt_length,
        length=prompt_length + np.diff(seats[first]),
        kept=kept,
        slot=seats[:-1] + shift,
        position=prompt_length[prompt] + depth,
        subtree_end=seats[end] + shift,
    )


def _subtree_ends(trees: SearchTrees) -> Int64[np.ndarray, " N"]:
    """One past the last descendant of each node."""
    size = np.ones(len(trees.step), np.int64)
    for step in range(int(trees.step.max(initial=0)), 0, -1):
        at = np.flatnonzero(trees.step == step)
        np.add.at(size, trees.parent[at], size[at])
    return np.arange(len(size)) + size


def _tokens_above(trees: SearchTrees) -> Int64[np.ndarray, " N"]:
    """Number of tokens between the prompt and the first token of each node."""
    above, span = np.zeros(len(trees.step), np.int64), np.diff(trees.token_start)
    for step in range(1, int(trees.step.max(initial=0)) + 1):
        at = np.flatnonzero(trees.step == step)
        above[at] = above[trees.parent[at]] + span[trees.parent[at]]
    return above


def _ends(trees: SearchTrees, layout: _Layout) -> Int64[np.ndarray, " N"]:
    """Slot of the last token of each node; of the prompt's end at a root."""
    inner = trees.step > 0
    end = layout.prompt_length[trees.prompt_of_node] - 1
    end[inner] = layout.slot[trees.token_start[1:][inner] - 1]
    return end


def _predictors(
    trees: SearchTrees,
    layout: _Layout,
    at: Int64[np.ndarray, " E"],
    choice: Int64[np.ndarray, " E"],
) -> Int64[np.ndarray, " E"]:
    """Slot whose output predicts each choice: the token before it on its path."""
    parent = trees.parent[at]
    before = np.where(choice > trees.token_start[at], choice, trees.token_start[parent + 1]) - 1
    opens = (choice == trees.token_start[at]) & (trees.step[parent] == 0)
    prompt_end = layout.prompt_length[trees.prompt_of_node[at]] - 1
    return np.where(opens, prompt_end, layout.slot[before])


def _edges(
    trees: SearchTrees, at: Int64[np.ndarray, " E"], choice: Int64[np.ndarray, " E"], trie: Trie
) -> tuple[Int64[np.ndarray, " E"], Int64[np.ndarray, " E"]]:
    """Trie node that each choice starts from and trie node (or, in free text, token) it takes."""
    state, edge = trees.state[at], trees.token[choice].astype(np.int64)
    bound = state != SearchTrees.FREE_TEXT
    # A node knows the state after its whole span; earlier tokens of the span lie above it.
    taken = torch.from_numpy(state[bound])
    climb = torch.from_numpy((trees.token_start[at + 1] - 1 - choice)[bound])
    while bool((climb > 0).any()):
        taken = torch.where(climb > 0, trie.parent(taken), taken)
        climb = climb - 1
    edge[bound], state[bound] = taken.numpy(), trie.parent(taken).numpy()
    return state, edge


def _rows(trees: SearchTrees, layout: _Layout, pad: int) -> dict[str, np.ndarray]:
    """The tables of the batch by field name."""
    prompts, kept = trees.prompts, layout.kept
    owner, place = ragged.owners(prompts.token_start), ragged.places(prompts.token_start)
    used = layout.prompt_length[owner] > 0
    row = np.concatenate(
        [owner[used], trees.prompt_of_node[ragged.owners(trees.token_start)[kept]]]
    )
    slot = np.concatenate([place[used], layout.slot[kept]])
    content = {
        "token": (pad, prompts.token[used], trees.token[kept]),
        "position": (0, place[used], layout.position[kept]),
        "subtree_end": (0, layout.length[owner[used]], layout.subtree_end[kept]),
    }
    tables: dict[str, np.ndarray] = {}
    for name, (fill, of_prompts, of_trees) in content.items():
        # A batch of no slots at all still is one forward pass, of padding.
        width = max(1, int(layout.length.max(initial=0)))
        tables[name] = np.full((len(layout.length), width), fill, np.int32)
        tables[name][row, slot] = np.concatenate([of_prompts, of_trees])
    return tables


def _sequences(
    trees: SearchTrees,
    choice: Int64[np.ndarray, " E"],
    earned: Sequence[Float32[np.ndarray, "C K"]],
    length: Int64[np.ndarray, " C"],
) -> SequenceTargets:
    """The choices on each candidate's path, and what the candidate earned over all its tokens."""
    path, span = trees.paths(), np.diff(trees.token_start)
    inside = path >= 0
    candidate, node = np.nonzero(inside)[0], path[inside]
    token = ragged.ranges(trees.token_start[node], span[node])
    owner = np.repeat(candidate, span[node])
    number = np.full(len(trees.token), -1)
    number[choice] = np.arange(len(choice))
    chosen = number[token] >= 0
    total = sum((one.astype(np.float64) for one in earned), np.zeros(path.shape))
    advantage = np.where(inside, total * span[path], 0).sum(1)
    return SequenceTargets(
        row=trees.prompt_of_candidate,
        advantage=advantage.astype(np.float32),
        length=np.maximum(1, length).astype(np.float32),
        choice=number[token[chosen]],
        candidate=owner[chosen],
    )


def _node_sums(
    path: Int64[np.ndarray, "C K"], values: Sequence[Float32[np.ndarray, "C K"]], num_nodes: int
) -> Float32[np.ndarray, " N"]:
    """Sum of each node's values over the candidates through it."""
    inside = path >= 0
    total = np.zeros(num_nodes)
    for value in values:
        total += np.bincount(path[inside], weights=value[inside], minlength=num_nodes)
    return total.astype(np.float32)


def _unshare(trees: SearchTrees) -> SearchTrees:
    """A tree of its own for each candidate."""
    prompt = trees.prompt_of_candidate
    node = np.concatenate([trees.node_start[prompt][:, None], trees.paths()], axis=1)
    length = (node >= 0).sum(1)
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
        logprob=ragged.take(trees.logprob, trees.token_start, nodes)[0],
        forced=ragged.take(trees.forced, trees.token_start, nodes)[0],
        candidate=start[1:] - 1,
        candidate_start=np.arange(len(prompt) + 1),
    )
