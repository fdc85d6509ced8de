"""Neighbors by tables of the codebooks are those of the points themselves."""

import numpy as np
import pytest

from orchard.semantic_ids.neighbors import nearest_items


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_neighbors_are_those_of_the_sums_of_centroids(levels: int) -> None:
    draw = np.random.default_rng(levels)
    books = [draw.standard_normal((9, 5)).astype(np.float32) for _ in range(levels)]
    codes = draw.integers(9, size=(200, levels))
    points = draw.standard_normal((7, 5)).astype(np.float32)
    rows, distances = nearest_items(points, books, codes, 6)
    stands_for = sum(book[codes[:, level]] for level, book in enumerate(books))
    expected = np.linalg.norm(points[:, None].astype(np.float64) - stands_for[None], axis=2)
    order = np.argsort(expected.round(9), axis=1, kind="stable")[:, :6]
    assert np.take_along_axis(expected, order, axis=1) == pytest.approx(distances, abs=1e-5)
    if levels > 1:  # with a single level, most items stand for the same few points
        assert (rows == order).all()
    for row in rows:
        assert len(set(row.tolist())) == 6


def test_items_at_one_point_come_in_their_order_and_few_items_are_all() -> None:
    books = [np.eye(3, dtype=np.float32)]
    points = np.array([[1, 0, 0]], dtype=np.float32)
    rows, distances = nearest_items(points, books, np.array([[1], [0], [2], [0], [0]]), 2)
    assert rows.tolist() == [[1, 3]]
    assert distances.tolist() == [[0, 0]]
    rows, _ = nearest_items(points, books, np.array([[1], [0]]), 5)
    assert rows.tolist() == [[1, 0]]
    rows, _ = nearest_items(points, books, np.zeros((0, 1), dtype=np.int64), 5)
    assert rows.shape == (1, 0)
