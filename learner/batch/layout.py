"""Lay search trees out in rows: slots, positions, and where each choice is predicted.

Shapes:  B rows   S slots of the widest row   N nodes   M tokens of all nodes   E choices
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int64

from orchard import ragged
from orchard.catalog.trie import Trie
from orchard.types import SearchTrees


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
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


def lay_out(
    trees: SearchTrees,
    node_of_token: Int64[np.ndarray, " M"],
    choice: Int64[np.ndarray, " E"],
    *,
    keep_all: bool,
) -> Layout:
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
    return Layout(
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


def last_slots(trees: SearchTrees, layout: Layout) -> Int64[np.ndarray, " N"]:
    """Return the slot of the last token of each node; of the prompt's last token at a root."""
    inner = trees.step > 0
    last_slot = layout.prompt_length[trees.prompt_of_node] - 1
    last_slot[inner] = layout.slot[trees.token_start[1:][inner] - 1]
    return last_slot


def query_slots(
    trees: SearchTrees,
    layout: Layout,
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


def trie_edges(
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


def dense_tables(trees: SearchTrees, layout: Layout, pad: int) -> dict[str, np.ndarray]:
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
