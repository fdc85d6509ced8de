r"""Utilities of prefixes: mean rewards below each prefix of semantic IDs, by clusters of histories.

HRPO (arXiv 2608.00750) estimates from logged rewards the utility of every prefix p in a cluster c
of users, shrunk towards what is known with less detail:

    U(c, p) = (sum of the rewards below p in c + a B(c, p)) / (n(c, p) + a)

with n the number of items shown below p and the prior a. Clusters form a chain from coarse to fine,
all histories first, and with c' the cluster above c and p' the prefix above p

    residual   B(c, p) = U(c, p') + U(c', p) - U(c', p')
    paper      B(c, p) = U(c, p') where n(c, p) > 0, else U(c', p)

`residual` lets a cluster's taste for a prefix reach the items below it and adds what all think of
the next code. At the first cluster, of all, B is U(p'), and at its root the mean reward. A code
without an alternative has the utility of the prefix before it.

The reward of code l is the residual U(c, y_1..l) - U(c, y_1..l-1). Residuals add up to the utility
of the item less that of the root.

Without feedback, a training row says that of all leaves its target alone had reward 1: n(c, p) is
then the number of rows of c times the number of leaves below p, and the utility of an item is the
share of the rows of the cluster with this target. With clusters by last item it is the counted
transition from the last item, to which `rewards.transition` adds older items.

A row does not judge itself: what a prompt's own request has added is taken out of every sum before
its utilities are computed, which gives the same as to fit without the request.

Shapes:  G requests   G1 = G + 1   R shown items   K leaves   N nodes   B prompts   Q queries
         O left-out items   X clusters of the chain   D1 = D + 1, root and codes of the longest item
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64, Int64

from orchard import ragged
from orchard.catalog.trie import Trie
from orchard.errors import DataError
from orchard.feedback.clusters import Clusters
from orchard.feedback.paths import forced_nodes, leaves_below, paths_of
from orchard.guide.left_out import Sums

_NOTHING = 1e-9
"""Count below which nothing is left: weights are sums of floating-point numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """Requests, with the items that were shown and their rewards."""

    history: Int64[np.ndarray, " H"]
    """Leaves of the histories, oldest first."""
    start: Int64[np.ndarray, " G1"]
    target: Int64[np.ndarray, " G"]
    """Leaf that is the target of each request's prompt."""
    row_start: Int64[np.ndarray, " G1"]
    """Shown items of request g: `row_start[g] : row_start[g + 1]`."""
    leaf: Int64[np.ndarray, " R"]
    reward: Float64[np.ndarray, " R"]
    weight: Float64[np.ndarray, " R"]

    def __len__(self) -> int:
        return len(self.target)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """Shown items that are taken out of the sums for some prompts."""

    prompt: Int64[np.ndarray, " O"]
    leaf: Int64[np.ndarray, " O"]
    reward: Float64[np.ndarray, " O"]
    weight: Float64[np.ndarray, " O"]

    @classmethod
    def of(cls, examples: Examples, own: Int64[np.ndarray, " B"]) -> "LeftOut":
        """Leave out the request `own[b]` for prompt b, nothing where it is -1."""
        prompt = np.flatnonzero(own >= 0)
        first = examples.row_start[own[prompt]]
        count = examples.row_start[own[prompt] + 1] - first
        row = ragged.ranges(first, count)
        return cls(
            prompt=np.repeat(prompt, count),
            leaf=examples.leaf[row],
            reward=examples.reward[row],
            weight=examples.weight[row],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixUtilities:
    """Sums of rewards and counts by cluster and prefix, from which utilities are computed."""

    trie: Trie
    clusters: tuple[Clusters, ...]
    """Clusters from coarse to fine; that of all histories comes before them."""
    examples: Examples
    exhaustive: bool
    """Whether each request shows every leaf, those that it does not list with reward 0."""
    prior: float
    backoff: Literal["residual", "paper"]
    total: tuple[Sums, ...]
    """Rewards of each cluster of the chain, by key cluster * N + node."""
    count: tuple[Sums, ...]
    """Shown items by the same keys; if exhaustive, requests by cluster."""
    below: Int64[np.ndarray, " N"]
    """Number of leaves at or below each node."""
    forced: Int64[np.ndarray, " N"]
    """1 for a node whose code has no alternative, else 0."""

    def cluster_of(
        self, history: Int64[np.ndarray, " H"], start: Int64[np.ndarray, " G1"]
    ) -> Int64[np.ndarray, "X G"]:
        """Return the cluster of each history at each place of the chain."""
        return _chain(self.clusters, history, start)

    def values(
        self,
        cluster: Int64[np.ndarray, "X B"],
        prompt: Int64[np.ndarray, " Q"],
        leaf: Int64[np.ndarray, " Q"],
        left_out: LeftOut | None = None,
    ) -> Float64[np.ndarray, "Q D1"]:
        """Return the utilities of the root and of each prefix of leaves; that of the leaf goes on.

        Args:
            cluster: clusters of the prompts, of `cluster_of`.
            prompt: prompt of each query.
            leaf: leaf of each query.
            left_out: what is taken out of the sums for each prompt.
        """
        path = paths_of(self.trie, leaf)
        is_node = path >= 0
        node = np.where(is_node, path, 0)
        moves = is_node & (self.forced[node] == 0)
        own_total, own_count = np.zeros(path.shape), np.zeros(path.shape)
        if left_out is not None:
            own_total, own_count = self._own(left_out, prompt, node)
        above = np.zeros(path.shape)
        for index, (total, count) in enumerate(zip(self.total, self.count, strict=True)):
            at = cluster[index][prompt][:, None]
            key = at * self.trie.num_nodes + node
            rewards = _of(total, key) - own_total
            shown = _of(count, np.broadcast_to(at, key.shape) if self.exhaustive else key)
            if self.exhaustive:
                shown = shown * self.below[node]
            above = self._backed_off(rewards, shown - own_count, moves, above, is_first=index == 0)
        return above

    def _backed_off(
        self,
        total: Float64[np.ndarray, "Q D1"],
        count: Float64[np.ndarray, "Q D1"],
        moves: Bool[np.ndarray, "Q D1"],
        above: Float64[np.ndarray, "Q D1"],
        *,
        is_first: bool,
    ) -> Float64[np.ndarray, "Q D1"]:
        """Return the utilities of one cluster from its sums and those of the cluster above it."""
        is_empty = count < _NOTHING
        count = np.where(is_empty, 0.0, count)
        value = np.zeros(total.shape)
        if is_first:
            value[:, 0] = np.where(
                is_empty[:, 0], 0.0, total[:, 0] / np.maximum(count[:, 0], 1e-300)
            )
        else:
            value[:, 0] = (total[:, 0] + self.prior * above[:, 0]) / (count[:, 0] + self.prior)
        for level in range(1, total.shape[1]):
            base = value[:, level - 1]
            if not is_first and self.backoff == "residual":
                base = base + above[:, level] - above[:, level - 1]
            elif not is_first:
                base = np.where(is_empty[:, level], above[:, level], base)
            shrunk = (total[:, level] + self.prior * base) / (count[:, level] + self.prior)
            shrunk = np.where(is_empty[:, level], base, shrunk)
            value[:, level] = np.where(moves[:, level], shrunk, value[:, level - 1])
        return value

    def _own(
        self,
        left_out: LeftOut,
        prompt: Int64[np.ndarray, " Q"],
        node: Int64[np.ndarray, "Q D1"],
    ) -> tuple[Float64[np.ndarray, "Q D1"], Float64[np.ndarray, "Q D1"]]:
        """Return what is left out of the sums and counts of each query's prefixes."""
        path = paths_of(self.trie, left_out.leaf)
        size = self.trie.num_nodes
        key = prompt[:, None] * size + node
        own_total = _sums(left_out.prompt, path, left_out.reward * left_out.weight, size)
        if self.exhaustive:
            weight = Sums.by(left_out.prompt, left_out.weight)
            return _of(own_total, key), weight.of(prompt)[:, None] * self.below[node]
        return _of(own_total, key), _of(_sums(left_out.prompt, path, left_out.weight, size), key)


def fit_utilities(
    trie: Trie,
    examples: Examples,
    clusters: Sequence[Clusters] = (),
    *,
    prior: float = 1.0,
    backoff: Literal["residual", "paper"] = "residual",
    exhaustive: bool = False,
) -> PrefixUtilities:
    """Sum the rewards of requests by cluster and prefix.

    Args:
        trie: trie of the leaves.
        examples: requests with what was shown.
        clusters: clusters of histories from coarse to fine.
        prior: weight a of what is known with less detail, above 0.
        backoff: what is taken for that.
        exhaustive: whether each request shows every leaf, those that it does not list with
            reward 0; requests then list one leaf each.

    Raises:
        DataError: there are no shown items, or none with a weight.
    """
    if not (examples.weight > 0).any():
        raise DataError(
            f"{len(examples)} requests show {len(examples.leaf)} items with a weight above 0 for "
            "none; utilities need at least one",
            code="data.no_exposures",
        )
    path, request = paths_of(trie, examples.leaf), ragged.row_of(examples.row_start)
    of_request = _chain(clusters, examples.history, examples.start)
    total: list[Sums] = []
    count: list[Sums] = []
    for cluster in of_request:
        own = cluster[request]
        total.append(_sums(own, path, examples.reward * examples.weight, trie.num_nodes))
        shown = Sums.by(own, examples.weight)
        if not exhaustive:
            shown = _sums(own, path, examples.weight, trie.num_nodes)
        count.append(shown)
    return PrefixUtilities(
        trie=trie,
        clusters=tuple(clusters),
        examples=examples,
        exhaustive=exhaustive,
        prior=prior,
        backoff=backoff,
        total=tuple(total),
        count=tuple(count),
        below=leaves_below(trie),
        forced=forced_nodes(trie),
    )


def _chain(
    clusters: Sequence[Clusters],
    history: Int64[np.ndarray, " H"],
    start: Int64[np.ndarray, " G1"],
) -> Int64[np.ndarray, "X G"]:
    """Return the clusters of histories from coarse to fine, the first one of all."""
    everything = np.zeros(len(start) - 1, np.int64)
    return np.stack([everything, *(each(history, start) for each in clusters)])


def _sums(
    cluster: Int64[np.ndarray, " R"],
    path: Int64[np.ndarray, "R D1"],
    value: Float64[np.ndarray, " R"],
    num_nodes: int,
) -> Sums:
    """Sum values by cluster and by each node of a path."""
    inside = path >= 0
    key = cluster[:, None] * num_nodes + path
    return Sums.by(key[inside], np.broadcast_to(value[:, None], path.shape)[inside])


def _of(sums: Sums, key: Int64[np.ndarray, "Q D1"]) -> Float64[np.ndarray, "Q D1"]:
    """Look up a table of keys."""
    return sums.of(key.ravel()).reshape(key.shape)
