"""Utilities against their definition in plain Python, and without a request against a fit anew."""

from typing import Literal

import numpy as np
import pytest

from orchard import ragged
from orchard.catalog.catalog import Catalog
from orchard.errors import ConfigError, DataError
from orchard.feedback.clusters import make_clusters
from orchard.feedback.utilities import Examples, LeftOut, PrefixUtilities, fit_utilities
from orchard.testing import tiny_catalog

PRIOR = 1.5
Backoff = Literal["residual", "paper"]


@pytest.fixture(params=[False, True], ids=["one depth", "varying depth"])
def catalog(request: pytest.FixtureRequest) -> Catalog:
    return tiny_catalog(seed=3, num_items=40, varying_depth=request.param)


def examples(catalog: Catalog, *, number: int = 60, listed: int | None = None) -> Examples:
    """Random requests after histories of few items, of which clusters hold several."""
    rng = np.random.default_rng(1)
    leaves = catalog.trie.num_leaves
    start = ragged.starts(rng.integers(0, 4, number))
    shown = np.full(number, listed) if listed else rng.integers(1, 5, number)
    row_start = ragged.starts(shown)
    size = int(row_start[-1])
    leaf = rng.integers(leaves, size=size)
    return Examples(
        history=rng.integers(min(6, leaves), size=int(start[-1])),
        start=start,
        target=leaf[row_start[:-1]],
        row_start=row_start,
        leaf=leaf,
        reward=np.ones(size) if listed else rng.integers(-1, 4, size) / 2,
        weight=np.ones(size) if listed else rng.integers(0, 3, size) / 2,
    )


def without(shown: Examples, request: int) -> Examples:
    kept = np.delete(np.arange(len(shown)), request)
    history, start = ragged.take(shown.history, shown.start, kept)
    leaf, row_start = ragged.take(shown.leaf, shown.row_start, kept)
    return Examples(
        history=history, start=start, target=shown.target[kept], row_start=row_start, leaf=leaf,
        reward=ragged.take(shown.reward, shown.row_start, kept)[0],
        weight=ragged.take(shown.weight, shown.row_start, kept)[0],
    )  # fmt: skip


def fitted(
    catalog: Catalog, shown: Examples, *, backoff: Backoff = "residual", exhaustive: bool = False
) -> PrefixUtilities:
    clusters = make_clusters(
        ["last_code", "last_item"], catalog, history=shown.history, start=shown.start
    )
    return fit_utilities(
        catalog.trie, shown, clusters, prior=PRIOR, backoff=backoff, exhaustive=exhaustive
    )


def defined(
    catalog: Catalog,
    shown: Examples,
    history: list[int],
    leaf: int,
    backoff: Backoff,
    *,
    exhaustive: bool,
) -> list[float]:
    """The formula of the docstring, prefix by prefix."""
    codes = [
        tuple(c for c in catalog.codes[item].tolist() if c >= 0)
        for item in catalog.item_of_leaf[catalog.leaf_start[:-1]]
    ]
    prefix_of = [codes[leaf][:k] for k in range(len(codes[leaf]) + 1)]
    first = {k: code[:1] for k, code in enumerate(codes)}
    tests = [
        lambda other: True,
        lambda other: (
            (first[other[-1]] if other else None) == (first[history[-1]] if history else None)
        ),
        lambda other: (other[-1] if other else None) == (history[-1] if history else None),
    ]
    above: list[float] = []
    for place, belongs in enumerate(tests):
        value: list[float] = []
        for k, prefix in enumerate(prefix_of):
            total = number = 0.0
            for g in range(len(shown)):
                if not belongs(shown.history[shown.start[g] : shown.start[g + 1]].tolist()):
                    continue
                for row in range(shown.row_start[g], shown.row_start[g + 1]):
                    is_below = codes[shown.leaf[row]][:k] == prefix
                    total += is_below * shown.weight[row] * shown.reward[row]
                    every = sum(code[:k] == prefix for code in codes)
                    number += shown.weight[row] * (every if exhaustive else is_below)
            if k == 0:
                mean = total / number if number else 0.0
                value.append((total + PRIOR * above[0]) / (number + PRIOR) if place else mean)
                continue
            siblings = {
                code[:k] for code in codes if code[: k - 1] == prefix[:-1] and len(code) >= k
            }
            if len(siblings) == 1:
                value.append(value[-1])
                continue
            base = value[-1]
            if place and backoff == "residual":
                base += above[k] - above[k - 1]
            elif place and number == 0:
                base = above[k]
            value.append((total + PRIOR * base) / (number + PRIOR))
        above = value
    return above


@pytest.mark.slow
@pytest.mark.parametrize("exhaustive", [False, True], ids=["feedback", "next items"])
@pytest.mark.parametrize("backoff", ["residual", "paper"])
def test_utilities_are_those_of_the_definition(
    catalog: Catalog, backoff: Backoff, exhaustive: bool
) -> None:
    shown = examples(catalog, listed=1 if exhaustive else None)
    model = fitted(catalog, shown, backoff=backoff, exhaustive=exhaustive)
    histories = [[], [0], [3, 5], [catalog.trie.num_leaves - 1]]
    history = np.array([leaf for items in histories for leaf in items])
    cluster = model.cluster_of(history, ragged.starts(np.array([len(h) for h in histories])))
    leaves = np.arange(catalog.trie.num_leaves)
    prompt = np.repeat(np.arange(len(histories)), len(leaves))
    found = model.values(cluster, prompt, np.tile(leaves, len(histories)))
    for query, (p, leaf) in enumerate(zip(prompt, np.tile(leaves, len(histories)), strict=True)):
        wanted = defined(catalog, shown, histories[p], int(leaf), backoff, exhaustive=exhaustive)
        wanted += [wanted[-1]] * (found.shape[1] - len(wanted))
        assert found[query].tolist() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("exhaustive", [False, True], ids=["feedback", "next items"])
@pytest.mark.parametrize("backoff", ["residual", "paper"])
def test_a_request_is_left_out_as_if_it_had_never_been(
    catalog: Catalog, backoff: Backoff, exhaustive: bool
) -> None:
    shown = examples(catalog, number=12, listed=1 if exhaustive else None)
    model = fitted(catalog, shown, backoff=backoff, exhaustive=exhaustive)
    cluster = model.cluster_of(shown.history, shown.start)
    leaves = np.arange(catalog.trie.num_leaves)
    prompt = np.repeat(np.arange(len(shown)), len(leaves))
    own = np.where(np.arange(len(shown)) == 3, -1, np.arange(len(shown)))  # one is not left out
    found = model.values(
        cluster, prompt, np.tile(leaves, len(shown)), LeftOut.of(shown, own)
    ).reshape(len(shown), len(leaves), -1)
    for request in range(len(shown)):
        rest = shown if request == 3 else without(shown, request)
        anew = fitted(catalog, rest, backoff=backoff, exhaustive=exhaustive)
        wanted = anew.values(cluster, np.full(len(leaves), request), leaves)
        np.testing.assert_allclose(found[request], wanted, atol=1e-12)


def test_of_next_items_the_utility_is_the_share_of_the_rows(catalog: Catalog) -> None:
    shown = examples(catalog, listed=1)
    clusters = make_clusters(["last_item"], catalog, history=shown.history, start=shown.start)
    model = fit_utilities(catalog.trie, shown, clusters, prior=1e-12, exhaustive=True)
    cluster = model.cluster_of(shown.history, shown.start)
    prompt = np.arange(len(shown))
    found = model.values(cluster, prompt, shown.target)[:, -1]
    same = cluster[1][:, None] == cluster[1]
    share = (same & (shown.target[:, None] == shown.target)).sum(1) / same.sum(1)
    several = catalog.trie.num_leaves > 1
    assert several
    np.testing.assert_allclose(found, share, atol=1e-9)


def test_histories_are_clustered_by_their_embeddings() -> None:
    catalog = tiny_catalog(seed=3, num_items=40)
    leaves = catalog.trie.num_leaves
    side = np.where(catalog.leaf_of_item % 2 == 0, 1.0, -1.0)
    embedding = np.stack([side, np.ones(len(catalog)) * 0.1], 1)
    history = np.arange(leaves)
    start = np.arange(leaves + 1)
    (of_history,) = make_clusters(
        ["history"], catalog, history=history, start=start, embedding=embedding, groups=2
    )
    cluster = of_history(history, start)
    assert (cluster == np.where(history % 2 == 0, cluster[0], cluster[1])).all()
    assert cluster[0] != cluster[1]
    assert of_history(np.zeros(0, np.int64), np.zeros(2, np.int64)).tolist() == [-1]
    with pytest.raises(ConfigError, match="no embeddings; set data.embeddings"):
        make_clusters(["history"], catalog, history=history, start=start)


def test_nothing_with_a_weight_is_refused(catalog: Catalog) -> None:
    shown = examples(catalog)
    nothing = Examples(
        history=shown.history, start=shown.start, target=shown.target, row_start=shown.row_start,
        leaf=shown.leaf, reward=shown.reward, weight=np.zeros(len(shown.leaf)),
    )  # fmt: skip
    with pytest.raises(DataError, match="utilities need at least one"):
        fit_utilities(catalog.trie, nothing)
