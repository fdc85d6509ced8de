"""Pack scored trees into training rows: each token once, however many candidates share it.

A row is the prompt followed, in preorder, by the tree's tokens that some later choice is
conditioned on. Forced tokens at the end of a branch and the last choice of each candidate are
predicted or known but never read, so they take no slot. `flatten` lays out the same choices with
one candidate per row, as a trainer without trees does.

Shapes:  B rows   S slots of the widest row   N nodes   M tokens of all nodes   C candidates
         K steps of the longest candidate   E choices
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64

from learner.advantage.estimators import candidate_lengths, compute_advantages
from learner.value import value_targets
from orchard import ragged
from orchard.catalog.trie import Trie
from orchard.errors import CatalogError
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.settings import LearnerConfig
from orchard.types import Advantages, ScoredTrees, SearchTrees, SequenceTargets, TrainBatch


def make_batch(scored: ScoredTrees, tokenizer: ItemTokenizer, config: LearnerConfig) -> TrainBatch:
    """Compute the configured advantages of scored trees and pack both into a batch."""
    credits = compute_advantages(scored, config)
    discount, sequence_ratio = config.value.discount, config.ratio == "sequence"
    return pack(scored, credits, tokenizer, discount=discount, sequence_ratio=sequence_ratio)


def pack(
    scored: ScoredTrees,
    credits: Sequence[Advantages],
    tokenizer: ItemTokenizer,
    *,
    discount: float = 1.0,
    sequence_ratio: bool = False,
) -> TrainBatch:
    """Pack one tree per row; a tree without any choice becomes a row of padding.

    Every token of a step carries that step's credit. Several credits add up; the KL weight of a
    choice is the weight of the first credit, summed over the candidates through it. Where nodes
    have rewards, the batch also holds the discounted targets of the value head; every token then
    takes a slot, because each state has a value. With `sequence_ratio` it also holds the choices
    that make up each candidate and the advantages of whole candidates.

    Raises:
        CatalogError: the trees were grown on another catalog.
    """
    trees, node_reward, catalog = scored.trees, scored.node_reward, tokenizer.catalog
    if trees.catalog != catalog.digest:
        raise CatalogError(
            f"the trees were grown on catalog {trees.catalog[:12]}, the learner holds "
            f"{catalog.digest[:12]}; start both from the same items file"
        )
    # [C, K] node of each candidate at each step, NO_PARENT past its end
    path = trees.paths()
    # [N] number of candidates through each node
    num_through = np.bincount(path[path >= 0], minlength=len(trees.step))
    node_of_token = ragged.row_of(trees.token_start)
    # [E] flat token index of each choice: on some candidate's path and not forced
    choice = np.flatnonzero((num_through[node_of_token] > 0) & ~trees.forced)
    layout = _lay_out(trees, node_of_token, choice, keep_all=node_reward is not None)
    node_of_choice = node_of_token[choice]
    state, edge = _trie_edges(trees, node_of_choice, choice, catalog.trie)
    # [C, K] weighted advantage of each credit
    weighted = [credit.advantage * credit.weight for credit in credits]
    length = candidate_lengths(trees)
    prompt_length = np.diff(trees.prompts.token_start)[trees.prompt_of_candidate]
    num_nodes = len(num_through)
    return TrainBatch(
        **_dense_tables(trees, layout, tokenizer.pad),
        row=trees.prompt_of_node[node_of_choice],
        query_slot=_query_slots(trees, layout, node_of_choice, choice).astype(np.int32),
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
        flat_tokens=int((length + prompt_length).sum()),
        policy=trees.policy,
        catalog=trees.catalog,
        values=None
        if node_reward is None
        else value_targets(trees, node_reward, _last_slots(trees, layout), discount=discount),
        sequences=_sequence_targets(trees, choice, weighted, length) if sequence_ratio else None,
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Slots and positions of all tokens of the trees, and the lengths of the rows."""

    prompt_length: Int64[np.ndarray, " B"]
    """Number of slots of the prompt; 0 for a tree of which no token is kept."""
    length: Int64[np.ndarray, " B"]
    """Number of slots of the row."""
    kept: Bool[np.ndarray, " M"]
    """Mask of the tokens that have a slot: those with a choice strictly below them, or all."""
    slot: Int64[np.ndarray, " M"]
    """Slot of each kept token within its row; meaningless for the others."""
    position: Int64[np.ndarray, " M"]
    """Position ID of each token: number of tokens before it on its path, prompt included."""
    subtree_end: Int64[np.ndarray, " M"]
    """Slot one past the last kept token of the subtree below each token."""


def _lay_out(
    trees: SearchTrees,
    node_of_token: Int64[np.ndarray, " M"],
    choice: Int64[np.ndarray, " E"],
    *,
    keep_all: bool,
) -> _Layout:
    """Assign slots in preorder, which makes every subtree of tokens a contiguous range.

    Without `keep_all`, only the tokens that some choice is conditioned on are kept.
    """
    # [M] flat token index one past the subtree of the token's node
    end = trees.token_start[_subtree_ends(trees)][node_of_token]
    is_choice = np.zeros(len(node_of_token), np.int64)
    is_choice[choice] = 1
    # [M + 1] number of choices before each token; a token is kept if a later one is in its subtree
    choices_before = ragged.starts(is_choice)
    kept = choices_before[end] > choices_before[1:]
    # [B + 1] first flat token of each tree
    tree_start = trees.token_start[trees.node_start]
    is_read = choices_before[tree_start[1:]] > choices_before[tree_start[:-1]]
    if keep_all:
        kept, is_read = np.ones_like(kept), tree_start[1:] > tree_start[:-1]
    prompt_length = np.diff(trees.prompts.token_start) * is_read
    # [M + 1] number of kept tokens before each token, over all trees
    kept_before = ragged.starts(kept.astype(np.int64))
    prompt_of_token = trees.prompt_of_node[node_of_token]
    # [M] offset from that global count to the slot within the row
    shift = prompt_length[prompt_of_token] - kept_before[tree_start[prompt_of_token]]
    depth = _tokens_above(trees)[node_of_token] + ragged.index_in_row(trees.token_start)
    return _Layout(
        prompt_length=prompt_length,
        length=prompt_length + np.diff(kept_before[tree_start]),
        kept=kept,
        slot=kept_before[:-1] + shift,
        position=prompt_length[prompt_of_token] + depth,
        subtree_end=kept_before[end] + shift,
    )


def _subtree_ends(trees: SearchTrees) -> Int64[np.ndarray, " N"]:
    """Return the index one past the last descendant of each node."""
    # [N] number of nodes in each subtree, complete from the current step down
    size = np.ones(len(trees.step), np.int64)
    for step in range(int(trees.step.max(initial=0)), 0, -1):
        nodes = np.flatnonzero(trees.step == step)
        np.add.at(size, trees.parent[nodes], size[nodes])
    return np.arange(len(size)) + size


def _tokens_above(trees: SearchTrees) -> Int64[np.ndarray, " N"]:
    """Return the number of tokens between the prompt and the first token of each node."""
    above, span = np.zeros(len(trees.step), np.int64), np.diff(trees.token_start)
    for step in range(1, int(trees.step.max(initial=0)) + 1):
        nodes = np.flatnonzero(trees.step == step)
        parent = trees.parent[nodes]
        above[nodes] = above[parent] + span[parent]
    return above


def _last_slots(trees: SearchTrees, layout: _Layout) -> Int64[np.ndarray, " N"]:
    """Return the slot of the last token of each node; of the prompt's last token at a root."""
    inner = trees.step > 0
    last_slot = layout.prompt_length[trees.prompt_of_node] - 1
    last_slot[inner] = layout.slot[trees.token_start[1:][inner] - 1]
    return last_slot


def _query_slots(
    trees: SearchTrees,
    layout: _Layout,
    node_of_choice: Int64[np.ndarray, " E"],
    choice: Int64[np.ndarray, " E"],
) -> Int64[np.ndarray, " E"]:
    """Return the slot whose output predicts each choice: the token before it on its path."""
    first_token, parent = trees.token_start[node_of_choice], trees.parent[node_of_choice]
    # [E] flat token before the choice: in the same span, or the last of the parent's span
    before = np.where(choice > first_token, choice, trees.token_start[parent + 1]) - 1
    # [E] choices predicted by the prompt's last token
    follows_prompt = (choice == first_token) & (trees.step[parent] == 0)
    prompt_end = layout.prompt_length[trees.prompt_of_node[node_of_choice]] - 1
    return np.where(follows_prompt, prompt_end, layout.slot[before])


def _trie_edges(
    trees: SearchTrees,
    node_of_choice: Int64[np.ndarray, " E"],
    choice: Int64[np.ndarray, " E"],
    trie: Trie,
) -> tuple[Int64[np.ndarray, " E"], Int64[np.ndarray, " E"]]:
    """Return the trie node each choice starts from and the trie node it takes.

    In free text the two are `FREE_TEXT` and the token.
    """
    state, edge = trees.state[node_of_choice], trees.token[choice].astype(np.int64)
    in_trie = state != SearchTrees.FREE_TEXT
    # A node stores the state after its whole span; earlier tokens of the span lie above it.
    taken = torch.from_numpy(state[in_trie])
    # number of levels to climb: tokens of the span after the choice
    levels_up = torch.from_numpy((trees.token_start[node_of_choice + 1] - 1 - choice)[in_trie])
    while bool((levels_up > 0).any()):
        taken = torch.where(levels_up > 0, trie.parent(taken), taken)
        levels_up = levels_up - 1
    edge[in_trie], state[in_trie] = taken.numpy(), trie.parent(taken).numpy()
    return state, edge


def _dense_tables(trees: SearchTrees, layout: _Layout, pad: int) -> dict[str, np.ndarray]:
    """Build the [B, S] tables of the batch, by field name."""
    prompts, kept = trees.prompts, layout.kept
    prompt_of_token = ragged.row_of(prompts.token_start)
    slot_in_prompt = ragged.index_in_row(prompts.token_start)
    # prompt tokens of the rows that are not padding
    used = layout.prompt_length[prompt_of_token] > 0
    # row and slot of every filled cell: first all prompt tokens, then all kept tree tokens
    row = np.concatenate(
        [prompt_of_token[used], trees.prompt_of_node[ragged.row_of(trees.token_start)[kept]]]
    )
    slot = np.concatenate([slot_in_prompt[used], layout.slot[kept]])
    # per table: the padding value, the prompts' cells, the trees' cells
    content = {
        "token": (pad, prompts.token[used], trees.token[kept]),
        "position": (0, slot_in_prompt[used], layout.position[kept]),
        "subtree_end": (0, layout.length[prompt_of_token[used]], layout.subtree_end[kept]),
    }
    tables: dict[str, np.ndarray] = {}
    for name, (fill, prompt_cells, tree_cells) in content.items():
        # A batch without any slot still makes one forward pass, of padding.
        width = max(1, int(layout.length.max(initial=0)))
        tables[name] = np.full((len(layout.length), width), fill, np.int32)
        tables[name][row, slot] = np.concatenate([prompt_cells, tree_cells])
    return tables


def _sequence_targets(
    trees: SearchTrees,
    choice: Int64[np.ndarray, " E"],
    weighted: Sequence[Float32[np.ndarray, "C K"]],
    length: Int64[np.ndarray, " C"],
) -> SequenceTargets:
    """List the choices on each candidate's path and sum its weighted advantage over its tokens."""
    path, span = trees.paths(), np.diff(trees.token_start)
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
    total = sum((values.astype(np.float64) for values in weighted), np.zeros(path.shape))
    advantage = np.where(inside, total * span[path], 0).sum(1)
    return SequenceTargets(
        row=trees.prompt_of_candidate,
        advantage=advantage.astype(np.float32),
        length=np.maximum(1, length).astype(np.float32),
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
        logprob=ragged.take(trees.logprob, trees.token_start, nodes)[0],
        forced=ragged.take(trees.forced, trees.token_start, nodes)[0],
        candidate=start[1:] - 1,
        candidate_start=np.arange(len(prompt) + 1),
    )
