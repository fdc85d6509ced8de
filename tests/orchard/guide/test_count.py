"""Counted matrices against plain loops over the rows."""

from collections import defaultdict
from dataclasses import replace

import numpy as np

from orchard import ragged
from orchard.catalog.catalog import Catalog
from orchard.guide import count
from orchard.guide.expert import Expert, LeafRows
from tests.fixtures.guides import random_rows


def dense(expert: Expert) -> np.ndarray:
    size = len(expert.start) - 1
    table = np.zeros((size, size))
    owner = np.repeat(np.arange(size), np.diff(expert.start))
    table[owner, expert.after] = expert.strength
    return table


def pairs(rows: LeafRows, window: int, decay: float) -> np.ndarray:
    table = np.zeros((rows.num_leaves, rows.num_leaves))
    for row, target in enumerate(rows.target):
        history = rows.history[rows.start[row] : rows.start[row + 1]][::-1][:window]
        for age, before in enumerate(history):
            table[before, target] += decay**age
    return table


def test_conditional_counts(catalog: Catalog) -> None:
    rows = random_rows(catalog, seed=5)
    for made, window, decay, smoothing, both in (
        (count.transitions, 50, 0.6, 1.0, False),
        (count.cooccurrence, 10, 0.7, 2.0, False),
        (count.neighbors, 3, 0.7, 2.0, True),
    ):
        table = pairs(rows, window, decay)
        table = table + table.T if both else table
        wanted = table / (smoothing + table.sum(1, keepdims=True))
        assert np.allclose(dense(made(rows)), wanted, rtol=1e-6)


def test_a_row_counts_as_often_as_its_weight(catalog: Catalog) -> None:
    rows = random_rows(catalog, seed=5)
    times = np.arange(len(rows)) % 3
    chosen = np.repeat(np.arange(len(rows)), times)
    history, start = ragged.take(rows.history, rows.start, chosen)
    repeated = replace(
        rows, user=rows.user[chosen], history=history, start=start, target=rows.target[chosen]
    )
    weighted = replace(rows, weight=times.astype(np.float64))
    for made in (count.transitions, count.cooccurrence, count.neighbors):
        assert np.allclose(dense(made(weighted)), dense(made(repeated)), rtol=1e-6)
        ones = replace(rows, weight=np.ones(len(rows)))
        assert np.array_equal(dense(made(ones)), dense(made(rows)))
    # Which users have an item does not depend on weights above 0.
    half = replace(rows, weight=np.where(times > 0, 0.5, 1.0))
    assert np.array_equal(dense(count.item_knn(half)), dense(count.item_knn(rows)))
    assert weighted.popularity.tolist() == (
        np.bincount(rows.target[times > 0], minlength=rows.num_leaves).tolist()
    )
    assert len({rows.digest, weighted.digest, repeated.digest}) == 3


def test_item_knn_is_the_shrunk_cosine_of_users(catalog: Catalog) -> None:
    rows = random_rows(catalog, seed=6)
    users = defaultdict[int, set[int]](set)
    for row, target in enumerate(rows.target):
        for leaf in [*rows.history[rows.start[row] : rows.start[row + 1]], target]:
            users[int(leaf)].add(int(rows.user[row]))
    wanted = np.zeros((rows.num_leaves, rows.num_leaves))
    for a in users:
        for b in users:
            if a != b:
                size = np.sqrt(len(users[a]) * len(users[b]))
                wanted[a, b] = len(users[a] & users[b]) / (size + 5)
    assert np.allclose(dense(count.item_knn(rows)), wanted, rtol=1e-6)
