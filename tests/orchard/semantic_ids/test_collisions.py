"""Policies for items that share codes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchard.semantic_ids.collisions import (
    POLICIES,
    ResolvedCodes,
    extra_level,
    keep,
    reassign,
)
from orchard.semantic_ids.measure import measure_codes
from orchard.semantic_ids.projection import Projection
from orchard.semantic_ids.quantize import Quantized


def of_codes(codes: list[list[int]], *, last: int = 4) -> Quantized:
    """Codes whose items lie on the centroids of their last level, on a line."""
    book = np.arange(last, dtype=np.float32)[:, None]
    table = np.array(codes)
    return Quantized(
        codes=table,
        codebook=(book, book),
        error=np.zeros(2),
        last=book[table[:, -1]],
        projection=Projection(mean=np.zeros(1, dtype=np.float32)),
    )


def test_an_extra_level_counts_those_that_share_by_the_prior() -> None:
    made = of_codes([[0, 1], [0, 1], [2, 0], [0, 1]])
    settled = extra_level(made, np.array([1.0, 3.0, 9.0, 2.0]))
    assert settled.codes.tolist() == [[0, 1, 2], [0, 1, 0], [2, 0, 0], [0, 1, 1]]


def test_keeping_lists_the_likelier_item_first() -> None:
    made = of_codes([[0, 1], [2, 0], [0, 1], [0, 1]])
    settled = keep(made, np.array([1.0, 9.0, 2.0, 3.0]))
    assert settled.codes.tolist() == made.codes.tolist()
    assert settled.order.tolist() == [3, 1, 2, 0]


def test_reassigning_moves_as_little_as_it_can() -> None:
    made = of_codes([[0, 1], [0, 1], [0, 2], [1, 1]])
    settled = reassign(made, np.zeros(4))
    assert sorted(settled.codes[:2, 1].tolist()) == [0, 1]  # 2 is taken, 3 is farther
    assert settled.codes[2:].tolist() == [[0, 2], [1, 1]]
    crowded = reassign(of_codes([[0, 1]] * 6), np.zeros(6))
    quality = measure_codes(crowded.codes)
    assert (quality["distinct"], quality["items"]) == (4, 6)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=30))
@settings(max_examples=25)
@pytest.mark.parametrize("policy", POLICIES)
def test_policies_touch_the_last_level_and_those_that_collide_alone(
    policy: str, rows: list[tuple[int, int]]
) -> None:
    made = of_codes([list(row) for row in rows])
    prior = np.random.default_rng(len(rows)).random(len(rows))
    settled: ResolvedCodes = POLICIES[policy](made, prior)
    assert sorted(settled.order.tolist()) == list(range(len(rows)))
    assert (settled.codes[:, 0] == made.codes[:, 0]).all()
    alone = [rows.count(row) == 1 for row in rows]
    assert (settled.codes[alone, 1] == made.codes[alone, 1]).all()
    if policy == "extra_level":
        assert measure_codes(settled.codes)["colliding_items"] == 0
    per_prefix = [min(4, sum(r[0] == p for r in rows)) for p in {r[0] for r in rows}]
    if policy == "reassign":  # as many distinct codes as fit below each prefix
        assert measure_codes(settled.codes)["distinct"] == sum(per_prefix)
