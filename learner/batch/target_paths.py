r"""Put the paths of targets into search trees, for a cross entropy beside the policy loss.

Two terms learn the codes z of a prompt's target y* itself, with P prompts in the batch:

    anchor    weight * 1 / P sum_prompts 1 / |y*| sum_k -log pi(z_k | x, z_<k)
    hints     weight * the same sum over the codes that were given to the search as a hint

The first is the supervised term that GRPO-SR (arXiv 2604.14878) and AdaGRPO (arXiv 2606.08480) add
to the loss of GRPO, the second the cross entropy on hinted codes of HCGRec (arXiv 2608.11980),
which finds weights of .005 to .01 best. |y*| counts all codes, forced ones included, as the lengths
of the estimators do.

A target that the search has not found becomes one more chain in its prompt's tree, below the
deepest node that the two share. No candidate ends there: the chain has no advantage, and its codes
are no choices of the policy loss.

Shapes:  B prompts   N nodes of the trees   D codes of the longest target   A added nodes
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64

from orchard import ragged
from orchard.data.prompts import code_states
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.settings import LearnerConfig
from orchard.types import ScoredTrees, SearchTrees


def target_weights(
    trees: SearchTrees, tokenizer: ItemTokenizer, config: LearnerConfig
) -> Float64[np.ndarray, "B D"] | None:
    """Return the weight of each code of each target in the loss; None if no term has a weight.

    A code without an alternative has none, unless log-probabilities are over the whole vocabulary.
    """
    if not config.anchor and not config.hint_weight:
        return None
    before, after = code_states(tokenizer.catalog, trees.prompts.target)
    exists = after >= 0
    weight = np.full(after.shape, config.anchor)
    if config.hint_weight and trees.hinted is not None:
        weight += config.hint_weight * (np.arange(after.shape[1]) < trees.hinted[:, None])
    if trees.prompts.reward is not None:  # in feedback, only what somebody wanted is an anchor
        weight = weight * (trees.prompts.reward > 0)[:, None]
    share = 1 / np.maximum(1, len(trees) * exists.sum(1, keepdims=True))
    learned = exists.copy()
    if config.logprob == "trie":
        num_children = tokenizer.catalog.trie.num_children(torch.from_numpy(before[exists]))
        learned[exists] = num_children.numpy() > 1
    return np.where(learned, weight * share, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetPaths:
    """Scored trees that contain the paths of their targets."""

    scored: ScoredTrees
    node: Int64[np.ndarray, "B D"]
    """Node of each code of each target, -1 where it is not needed."""


def add_target_paths(
    scored: ScoredTrees, tokenizer: ItemTokenizer, needed: Bool[np.ndarray, "B D"]
) -> TargetPaths:
    """Add the path of each target down to its last needed code, where the tree has none.

    The trees are those of codes: one code to a node, and one node to each prefix. A prompt whose
    search has found nothing has no tree, and gets none.
    """
    trees, trie = scored.trees, tokenizer.catalog.trie
    # [B, D] trie node of each code that some needed code is at or below, -1 elsewhere
    _, state = code_states(tokenizer.catalog, trees.prompts.target)
    wanted = np.logical_or.accumulate(needed[:, ::-1], axis=1)[:, ::-1] & (state >= 0)
    wanted &= np.diff(trees.node_start)[:, None] > 0
    # Tree nodes by (prompt, trie node), ascending, to look up the prefixes that are there.
    key = trees.prompt_of_node * trie.num_nodes + trees.state
    order = np.argsort(key, kind="stable")
    sought = np.arange(len(trees))[:, None] * trie.num_nodes + state
    index = np.searchsorted(key[order], sought).clip(max=len(key) - 1)
    found = order[index]
    exists = wanted & (key[found] == sought)
    # One entry per added node, prompt after prompt and from the first code of each chain down.
    prompt, depth = np.nonzero(wanted & ~exists)
    num_present = exists.sum(1)
    # [A] old node below which the chain of each begins, and its place right behind that node
    deepest = found[prompt, np.maximum(num_present[prompt] - 1, 0)]
    top = np.where(num_present[prompt] > 0, deepest, trees.node_start[prompt])
    place = top + 1
    # [N] new index of each old node, and [A] of each added one
    moved = np.arange(len(key)) + np.searchsorted(place, np.arange(len(key)), side="right")
    added = place + np.arange(len(place))
    node = np.full(state.shape, -1)
    node[exists] = moved[found[exists]]
    node[prompt, depth] = added
    is_first = depth == num_present[prompt]
    above = np.where(is_first, moved[top], added - 1)
    at = trees.token_start[place]  # place of each added token
    new_state = torch.from_numpy(state[prompt, depth])
    parent = np.where(trees.parent < 0, trees.parent, moved[trees.parent])
    new_trees = replace(
        trees,
        node_start=trees.node_start + ragged.starts(np.bincount(prompt, minlength=len(trees))),
        parent=np.insert(parent, place, above),
        step=np.insert(trees.step, place, depth + 1),
        state=np.insert(trees.state, place, new_state.numpy()),
        token=np.insert(trees.token, at, tokenizer.token_of(new_state).numpy()),
        token_start=ragged.starts(np.insert(np.diff(trees.token_start), place, 1)),
        logprob=np.insert(trees.logprob, at, 0),
        forced=np.insert(
            trees.forced, at, (trie.num_children(trie.parent(new_state)) == 1).numpy()
        ),
        candidate=moved[trees.candidate],
        value=None if trees.value is None else np.insert(trees.value, place, np.nan),
    )
    reward = scored.node_reward
    return TargetPaths(
        scored=replace(
            scored,
            trees=new_trees,
            node_reward=None if reward is None else np.insert(reward, place, 0),
        ),
        node=node,
    )
