"""Verifiable rewards: a candidate against the item that really came next.

The target is the item of the prompt's own row, so equal histories with different targets are each
judged by their own. Items that share a semantic ID share a leaf and cannot be told apart here.

Shapes:  B prompts   C candidates   D longest sequence
"""

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from orchard.catalogue import Catalogue
from orchard.types import SearchTrees


def rule(trees: SearchTrees, catalogue: Catalogue) -> Float32[np.ndarray, " C"]:
    """1 for a candidate that is the target, else 0."""
    return _hit(trees, catalogue).astype(np.float32)


def ranking(trees: SearchTrees, catalogue: Catalogue) -> Float32[np.ndarray, " C"]:
    """A penalty for each miss that is ranked beside the target, largest for the best ranked.

    With G candidates, the miss at rank k gets -(1 / log2(k + 1)) / sum_j 1 / log2(j + 1), where j
    runs over all G ranks. The target gets 0, and so does every candidate of a group without the
    target: pushing such a group towards its own tail would have no evidence behind it. This is the
    form that ReRe (arXiv 2510.12211) and MiniOneRec (arXiv 2510.24431) run; the papers print
    another normaliser.
    """
    hit = _hit(trees, catalogue)
    share: Float64[np.ndarray, " C"] = 1 / np.log2(trees.rank + 1)
    prompt, num_prompts = trees.prompt_of_candidate, len(trees)
    total = np.bincount(prompt, weights=share, minlength=num_prompts)
    has_hit = np.bincount(prompt, weights=hit, minlength=num_prompts) > 0
    return np.where(has_hit[prompt] & ~hit, -share / total[prompt], 0).astype(np.float32)


def prefix(trees: SearchTrees, catalogue: Catalogue) -> Float32[np.ndarray, " C"]:
    """Share of the target's codes that the candidate has in common from the first code on.

    An end marker counts as a code, so 1 means a hit and nothing else.
    """
    target = catalogue.codes[trees.prompts.target[trees.prompt_of_candidate]]
    candidate = catalogue.codes[catalogue.item_of_leaf[catalogue.leaf_start[trees.leaf]]]
    same = (candidate == target) & (target >= 0)
    common = np.logical_and.accumulate(same, axis=1).sum(1)
    return (common / (target >= 0).sum(1)).astype(np.float32)


def _hit(trees: SearchTrees, catalogue: Catalogue) -> Bool[np.ndarray, " C"]:
    """Candidates that are the target; copies drawn more than once all count."""
    target: Int64[np.ndarray, " B"] = catalogue.leaf_of_item[trees.prompts.target]
    return trees.leaf == target[trees.prompt_of_candidate]
