"""Clusters of histories, within which utilities of prefixes are fitted.

Shapes:  G histories   G1 = G + 1   H history leaves   K leaves   E width of an embedding
         M clusters
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int64

from orchard import ragged
from orchard.catalog.catalog import Catalog
from orchard.errors import ConfigError
from orchard.feedback.paths import paths_of

NO_CLUSTER = -1
"""Cluster of an empty history."""
_DECAY = 0.7
"""Weight of a history item relative to the next one in the embedding of a history."""
_FITTED = 100_000
"""Maximum number of histories that centers are fitted to."""


Clusters = Callable[[Int64[np.ndarray, " H"], Int64[np.ndarray, " G1"]], Int64[np.ndarray, " G"]]
"""Function from histories of leaves to the cluster of each, `NO_CLUSTER` for an empty one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OfLastItem:
    """Clusters by the last item, or by what it belongs to."""

    cluster_of_leaf: Int64[np.ndarray, " K"]

    def __call__(
        self, history: Int64[np.ndarray, " H"], start: Int64[np.ndarray, " G1"]
    ) -> Int64[np.ndarray, " G"]:
        """Look up the last item of each history."""
        cluster = np.full(len(start) - 1, NO_CLUSTER)
        filled = np.diff(start) > 0
        cluster[filled] = self.cluster_of_leaf[history[start[1:][filled] - 1]]
        return cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class OfNearestCenter:
    """Clusters by the nearest center of the mean embedding of the items, recent ones foremost."""

    embedding: Float64[np.ndarray, "K E"]
    """Embedding of each leaf."""
    center: Float64[np.ndarray, "M E"]

    def __call__(
        self, history: Int64[np.ndarray, " H"], start: Int64[np.ndarray, " G1"]
    ) -> Int64[np.ndarray, " G"]:
        """Return the nearest center of each history."""
        mean = mean_embedding(self.embedding, history, start)
        distance = (self.center**2).sum(1) - 2 * mean @ self.center.T
        return np.where(np.diff(start) > 0, distance.argmin(1), NO_CLUSTER)


def mean_embedding(
    embedding: Float64[np.ndarray, "K E"],
    history: Int64[np.ndarray, " H"],
    start: Int64[np.ndarray, " G1"],
) -> Float64[np.ndarray, "G E"]:
    """Return the weighted mean of the leaf embeddings of each history, 0 for an empty one."""
    recent, start = ragged.last(history, start, 20)  # older ones weigh less than .001
    age = np.repeat(start[1:], np.diff(start)) - 1 - np.arange(len(recent))
    weight = _DECAY ** age.astype(np.float64)
    row = ragged.row_of(start)
    total = np.zeros((len(start) - 1, embedding.shape[1]))
    np.add.at(total, row, weight[:, None] * embedding[recent])
    scale = np.bincount(row, weight, minlength=len(total))
    return total / np.where(scale > 0, scale, 1.0)[:, None]


def make_clusters(
    names: Sequence[str],
    catalog: Catalog,
    *,
    history: Int64[np.ndarray, " H"],
    start: Int64[np.ndarray, " G1"],
    embedding: Float[np.ndarray, "I E"] | None = None,
    groups: int = 64,
    seed: int = 0,
) -> tuple[Clusters, ...]:
    """Make the clusters of the given names from the histories, of leaves, that they are fitted to.

    Args:
        names: `last_item`, `last_code` (the first code of the last item) or `history` (k-means of
            the mean embedding of the items).
        catalog: catalog of the leaves.
        history: leaves of all histories.
        start: start of each history.
        embedding: embedding of each item, for `history`.
        groups: number of centers of `history`.
        seed: random seed of k-means.

    Raises:
        ConfigError: histories are to be embedded, and items have no embeddings.
    """
    num_leaves = catalog.trie.num_leaves
    made: list[Clusters] = []
    for name in names:
        if name == "last_item":
            made.append(OfLastItem(cluster_of_leaf=np.arange(num_leaves)))
        elif name == "last_code":
            first = paths_of(catalog.trie, np.arange(num_leaves))[:, 1]
            made.append(OfLastItem(cluster_of_leaf=first))
        elif embedding is None:
            raise ConfigError(
                f'rewards.utility.clusters names "{name}", which embeds histories, and the data '
                "set has no embeddings; set data.embeddings, or choose last_item or last_code",
                code="config.no_embeddings",
            )
        else:
            leaf_embedding = _leaf_embedding(catalog, embedding)
            made.append(_fit_centers(leaf_embedding, history, start, groups=groups, seed=seed))
    return tuple(made)


def _leaf_embedding(
    catalog: Catalog, embedding: Float[np.ndarray, "I E"]
) -> Float64[np.ndarray, "K E"]:
    """Return the mean unit vector of the items of each leaf; an embedding of length 0 stays 0."""
    vectors = embedding.astype(np.float64)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(length > 0, length, 1.0)
    total = np.add.reduceat(unit[catalog.item_of_leaf], catalog.leaf_start[:-1])
    return total / np.diff(catalog.leaf_start)[:, None]


def _fit_centers(
    embedding: Float64[np.ndarray, "K E"],
    history: Int64[np.ndarray, " H"],
    start: Int64[np.ndarray, " G1"],
    *,
    groups: int,
    seed: int,
) -> OfNearestCenter:
    """Fit centers to a sample of the histories that are not empty."""
    from sklearn.cluster import MiniBatchKMeans  # takes a second to load

    filled = np.flatnonzero(np.diff(start) > 0)
    if len(filled) > _FITTED:
        filled = np.sort(np.random.default_rng(seed).choice(filled, _FITTED, replace=False))
    points = mean_embedding(embedding, *ragged.take(history, start, filled))
    number = min(groups, len(np.unique(points, axis=0)))
    make: Any = MiniBatchKMeans
    kmeans = make(number, random_state=seed, n_init=3, batch_size=4096)
    kmeans.fit(points)
    return OfNearestCenter(embedding=embedding, center=kmeans.cluster_centers_.astype(np.float64))
