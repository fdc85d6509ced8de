"""Carry a guide to a later catalog, whose leaves have other numbers.

Leaves are told apart by their codes. A leaf that is new has no score and no popularity; what is
known of one that is gone is dropped.

Shapes:  K leaves of the old catalog
"""

from dataclasses import replace

import numpy as np
import scipy.sparse
from jaxtyping import Int64

from orchard import arrays
from orchard.catalog.catalog import Catalog
from orchard.guide.expert import Expert
from orchard.guide.guide import Guide


def on_catalog(guide: Guide, catalog: Catalog) -> Guide:
    """Return the guide for the leaves of another catalog of the same codes."""
    if guide.catalog.digest == catalog.digest:
        return guide
    leaf, num_leaves = leaf_map(guide.catalog, catalog), catalog.trie.num_leaves
    popularity = np.zeros(num_leaves, np.int64)
    popularity[leaf[leaf >= 0]] = guide.popularity[leaf >= 0]
    experts = tuple(_moved(expert, leaf, num_leaves) for expert in guide.experts)
    return replace(guide, catalog=catalog, experts=experts, popularity=popularity)


def leaf_map(old: Catalog, new: Catalog) -> Int64[np.ndarray, " K"]:
    """Return the leaf of `new` that has the codes of each leaf of `old`; -1 where there is none."""
    # Codes of one item of each leaf, without end markers: these come and go with longer sequences.
    codes = [c.plain_codes[c.item_of_leaf[c.leaf_start[:-1]]] for c in (old, new)]
    key = arrays.row_keys(np.concatenate(codes))
    before, now = key[: len(codes[0])], key[len(codes[0]) :]
    order = now.argsort()
    place = np.searchsorted(now[order], before).clip(max=len(now) - 1)
    return np.where(now[order[place]] == before, order[place], -1)


def _moved(expert: Expert, leaf: Int64[np.ndarray, " K"], num_leaves: int) -> Expert:
    """Return the expert's matrix with rows and columns renumbered."""
    before, after = np.repeat(leaf, np.diff(expert.start)), leaf[expert.after]
    kept = (before >= 0) & (after >= 0)
    matrix = scipy.sparse.csr_array(
        (expert.strength[kept], (before[kept], after[kept])), shape=(num_leaves, num_leaves)
    )
    matrix.sort_indices()
    return replace(
        expert,
        start=matrix.indptr.astype(np.int64),
        after=matrix.indices.astype(np.int32),
        strength=matrix.data.astype(np.float32),
    )
