"""Reward from item-to-item transition counts of the training rows.

At the top of a list, transition counts rank better than a small policy trained from scratch, and
the two make different errors, so that a policy can learn from the counts:
`docs/decisions/0009-counts-transitions.md`.

Shapes:  C candidates
"""

import numpy as np
from jaxtyping import Float32

from orchard import ragged
from orchard.types import SearchTrees
from rewards.context import RewardContext
from rewards.transition_counts import recency


def transition(trees: SearchTrees, ctx: RewardContext) -> Float32[np.ndarray, " C"]:
    """Return log(floor + s), with s the strength of transitions from history to candidate.

    s(y | h) = sum over the items a of h, j before its last, of decay^j n(a, y) / (1 + n(a)), with
    n(a, y) the summed decay^j of the training rows that have a at age j and the target y, and n(a)
    its sum over y. The row's own contribution to the counts is subtracted (leave-one-out);
    otherwise a training row would see its own target in the counts, which a new row cannot.
    """
    counts, floor = ctx.counted_transitions, ctx.settings.transition.floor
    prompts, leaf_of_item = trees.prompts, ctx.catalog.leaf_of_item
    before, target = leaf_of_item[prompts.history], leaf_of_item[prompts.target]
    start, weight = prompts.history_start, recency(prompts.history_start, counts.decay)
    owner = ragged.row_of(start)
    # The row's own contribution, per history item; an item may occur more than once.
    distinct, inverse = np.unique(owner * counts.num_leaves + before, return_inverse=True)
    self_weight = np.bincount(inverse, weights=weight, minlength=len(distinct))[inverse]
    if not ctx.are_counted:
        self_weight = np.zeros(len(before))
    scale = weight / (1 + np.maximum(0, counts.total[before] - self_weight))
    # One row for each pair of a candidate and an item of its prompt's history.
    prompt = trees.prompt_of_candidate
    length = np.diff(start)[prompt]
    candidate_index = np.repeat(np.arange(len(prompt)), length)
    history_index = ragged.ranges(start[prompt], length)
    after = trees.leaf[candidate_index]
    pair_weight = counts.of(before[history_index] * counts.num_leaves + after)
    is_target = after == target[prompt[candidate_index]]
    pair_weight = np.maximum(0, pair_weight - np.where(is_target, self_weight[history_index], 0))
    strength = np.bincount(
        candidate_index, weights=scale[history_index] * pair_weight, minlength=len(prompt)
    )
    return np.log(floor + strength).astype(np.float32)
