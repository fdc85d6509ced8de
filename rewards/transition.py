"""What tends to follow the items of a history, counted.

Counted transitions are better than a small policy from scratch at the top of a list, and the two
err differently, so that a policy can learn from them: `docs/decisions/0009-counted-transitions.md`.

Shapes:  C candidates
"""

import numpy as np
from jaxtyping import Float32

from orchard import ragged
from orchard.types import SearchTrees
from rewards.context import RewardContext
from rewards.transition_counts import recency


def transition(trees: SearchTrees, known: RewardContext) -> Float32[np.ndarray, " C"]:
    """log(floor + s): s is how strongly the history's items were followed by the candidate.

    s(y | h) = sum over the items a of h, j before its last, of decay^j n(a, y) / (1 + n(a)), with
    n(a, y) the summed decay^j of the training rows that have a at age j and the target y, and n(a)
    its sum over y. A row is judged by the others: what it counts itself is left out. Without that,
    a training row would hear of its own target, which no row does that is new.
    """
    counted, floor = known.counted_transitions, known.settings.transition.floor
    prompts, of_item = trees.prompts, known.catalog.leaf_of_item
    before, target = of_item[prompts.history], of_item[prompts.target]
    start, weight = prompts.history_start, recency(prompts.history_start, counted.decay)
    owner = ragged.owners(start)
    # What the row itself counts: an item may be in its history more than once.
    same, place = np.unique(owner * counted.num_leaves + before, return_inverse=True)
    own = np.bincount(place, weights=weight, minlength=len(same))[place]
    scale = weight / (1 + np.maximum(0, counted.total[before] - own))
    # Every candidate beside every item of its prompt's history.
    prompt = trees.prompt_of_candidate
    length = np.diff(start)[prompt]
    candidate = np.repeat(np.arange(len(prompt)), length)
    item = ragged.ranges(start[prompt], length)
    after = trees.leaf[candidate]
    met = counted.of(before[item] * counted.num_leaves + after)
    met = np.maximum(0, met - np.where(after == target[prompt[candidate]], own[item], 0))
    strength = np.bincount(candidate, weights=scale[item] * met, minlength=len(prompt))
    return np.log(floor + strength).astype(np.float32)
