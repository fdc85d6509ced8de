"""Residual and balanced quantization."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchard.semantic_ids.quantize import match, quantize
from tests.fixtures.points import blobs


def test_levels_find_the_scales_of_the_data() -> None:
    points = blobs()
    found = quantize(points, (4, 4))
    coarse, fine = np.repeat(np.arange(4), 40), np.tile(np.repeat(np.arange(4), 10), 4)
    for level, truth in enumerate((coarse, fine)):
        pairs = np.unique(np.stack([found.codes[:, level], truth]), axis=1)
        assert pairs.shape[1] == 4  # one to one
    assert 1 > found.error[0] > 100 * found.error[1] > 0


def test_residuals_add_up_to_the_embedding() -> None:
    points = np.random.default_rng(0).standard_normal((200, 6)).astype(np.float32)
    found = quantize(points, (8, 8, 8))
    parts = [book[found.codes[:, level]] for level, book in enumerate(found.codebook)]
    centred = points - points.mean(0)
    rest = ((centred - sum(parts)) ** 2).sum() / (centred**2).sum()
    assert rest == pytest.approx(found.error[-1], rel=1e-4)
    assert (np.diff(found.error) < 0).all()
    again = quantize(points, (8, 8, 8))
    assert (again.codes == found.codes).all()


@given(st.integers(2, 40), st.integers(2, 6), st.integers(0, 1000))
@settings(max_examples=25)
def test_a_match_fits_and_is_stable(items: int, codes: int, seed: int) -> None:
    distance = np.random.default_rng(seed).random((items, codes), dtype=np.float32)
    most = math.ceil(items / codes)
    code = match(distance, most)
    own = distance[np.arange(items), code]
    count = np.bincount(code, minlength=codes)
    assert count.max() <= most
    for item in range(items):
        for other in np.flatnonzero(distance[item] < own[item]):
            assert count[other] == most
            assert own[code == other].max() <= distance[item, other]


def test_balanced_codes_are_used_alike() -> None:
    draw = np.random.default_rng(0)
    skewed = (draw.standard_normal((300, 4)) * np.array([9, 1, 1, 1])).astype(np.float32)
    plain, even = (quantize(skewed, (7, 7), balanced=b) for b in (False, True))
    for level in (0, 1):
        assert np.bincount(even.codes[:, level]).max() <= math.ceil(300 / 7)
    assert np.bincount(plain.codes[:, 0]).max() > math.ceil(300 / 7)
    assert even.error[-1] < 1
