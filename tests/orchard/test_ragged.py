"""Membership in the rows of a ragged array."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from orchard import ragged


@given(rows=st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=5))
def test_a_value_is_looked_for_in_its_own_row_alone(rows: list[list[int]]) -> None:
    values = np.array([value for row in rows for value in row], np.int64)
    start = ragged.starts(np.array([len(row) for row in rows]))
    asked = [(row, value) for row in range(len(rows)) for value in range(8)]
    row, query = np.array(asked).T
    found = ragged.contains(values, start, row, query)
    assert found.tolist() == [value in rows[row] for row, value in asked]
