"""Core of an interaction log."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchard.data.importers.log import k_core
from orchard.errors import DataError
from tests.fixtures.logs import log_of


@given(st.lists(st.tuples(*[st.integers(0, 5)] * 2), min_size=1, max_size=60), st.integers(1, 3))
@settings(max_examples=25)
def test_the_core_is_what_dropping_one_by_one_leaves(pairs: list[tuple[int, int]], k: int) -> None:
    left = list(range(len(pairs)))
    while True:
        poor = [
            e for e in left
            if min(sum(pairs[o][side] == pairs[e][side] for o in left) for side in (0, 1)) < k
        ]  # fmt: skip
        if not poor:
            break
        left.remove(poor[0])
    log = log_of([(u, i, t) for t, (u, i) in enumerate(pairs)])
    if not left:
        with pytest.raises(DataError, match="lower --core"):
            k_core(log, k)
        return
    kept = k_core(log, k)
    assert kept.timestamp.tolist() == left
    found = list(zip(kept.user_id[kept.user], kept.items.item_id[kept.item], strict=True))
    assert found == [pairs[e] for e in left]
