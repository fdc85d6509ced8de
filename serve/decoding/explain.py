"""Explain a guided answer: what each expert adds to the rank of an item, and the values above it.

Shapes:  M items   D longest sequence
"""

from collections.abc import Sequence

import numpy as np
import torch

from orchard.guide.guide import Guide
from orchard.types import Prompts
from serve.schema import GuideShare, Item


def explain_guide(
    guide: Guide, prompt: Prompts, items: Sequence[Item], leaf: Sequence[int]
) -> list[Item]:
    """Return the items of one prompt with the guide's shares, and its value at every level.

    Args:
        guide: guide of the search.
        prompt: the one prompt.
        items: ranked items.
        leaf: trie leaf of each item.
    """
    trie, leaves = guide.catalog.trie, np.array(leaf, np.int64)
    owner = np.zeros(len(leaves), np.int64)
    shares = guide.shares(prompt, owner, leaves)
    path = trie.path(trie.node_of(torch.from_numpy(leaves)))  # [M, D], -1 past the end
    at = path >= 0
    value = np.full(path.shape, np.nan, np.float32)
    value[at.numpy()] = guide.values(prompt)(np.zeros(int(at.sum()), np.int64), path[at])
    return [
        item.model_copy(
            update={
                "levels": _with_values(item, value[row].tolist()),
                "guide": GuideShare(
                    reward=float(shares[row].sum()),
                    summands=dict(zip(guide.summands, shares[row].tolist(), strict=True)),
                ),
            }
        )
        for row, item in enumerate(items)
    ]


def _with_values(item: Item, value: list[float]) -> list[object] | None:
    """Return the levels of an item with the value of each prefix."""
    if item.levels is None:
        return None
    return [
        level.model_copy(update={"value": value[depth]}) for depth, level in enumerate(item.levels)
    ]
