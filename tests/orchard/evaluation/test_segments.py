"""Segments of held-out rows against counting one row at a time."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchard.evaluation.ranking import TargetRanks
from orchard.evaluation.segments import by_segment, segments_of

ITEMS = 12


a_row = st.tuples(
    st.integers(0, 5), st.lists(st.integers(0, ITEMS - 1), max_size=14), st.integers(0, ITEMS - 1)
)


@pytest.mark.slow
@given(
    st.lists(a_row, min_size=1, max_size=20), st.lists(a_row, min_size=1, max_size=20), st.data()
)
@settings(max_examples=40)
def test_every_row_is_in_one_segment_of_each_kind(train: Any, held_out: Any, data: Any) -> None:
    rows = np.array(data.draw(st.lists(st.integers(0, len(held_out) - 1), min_size=1, unique=True)))
    chosen = [held_out[row] for row in rows]
    seen = [item for _, history, target in train for item in (*history, target)]
    found = segments_of(
        target=np.array([target for _, _, target in chosen]),
        history_length=np.array([len(history) for _, history, _ in chosen]),
        user=np.array([user for user, _, _ in chosen]),
        train_item=np.array(seen),
        train_user=np.array([user for user, _, _ in train]),
    )
    known = {user for user, _, _ in train}
    kinds = {
        kind: {name: mask for name, mask in found.items() if name.startswith(kind)}
        for kind in ("target", "history", "user")
    }
    for masks in kinds.values():
        assert np.array_equal(np.sum(list(masks.values()), axis=0), np.ones(len(rows)))
    fifths = list[tuple[int, int]]()
    for place, row in enumerate(rows):
        user, history, target = held_out[row]
        (name,) = [n for n, mask in kinds["history"].items() if mask[place]]
        bounds = [int(word) for word in name.split() if word.isdigit()]
        assert bounds[0] <= len(history) <= (bounds[1] if len(bounds) > 1 else len(history))
        (name,) = [n for n, mask in kinds["user"].items() if mask[place]]
        assert name.startswith("user with ") == (user in known)
        (name,) = [n for n, mask in kinds["target"].items() if mask[place]]
        assert ("never" in name) == (target not in seen)
        if target in seen:
            fifths.append((seen.count(target), int(name.split()[3])))
    # A more popular target is in no lower fifth, and an equally popular one in the same.
    for count, fifth in fifths:
        for other, its_fifth in fifths:
            assert (fifth == its_fifth) if count == other else True
            assert (fifth <= its_fifth) if count < other else True


def test_segments_have_the_means_of_their_own_rows() -> None:
    miss = TargetRanks.MISS
    ranks = TargetRanks(sid=np.array([0, 3, miss, 12]), item=np.array([1, miss, miss, miss]))
    masks = {"a": np.array([True, True, False, False]), "b": np.array([False, False, True, True])}
    found = by_segment(ranks, masks, width=20, resamples=100)
    assert {name: estimates["hr@10/sid"].n for name, estimates in found.items()} == {"a": 2, "b": 2}
    assert found["a"]["hr@10/sid"].mean == 1
    assert found["a"]["mrr@20/sid"].mean == pytest.approx((1 + 1 / 4) / 2)
    assert found["a"]["ndcg@10/item"].mean == pytest.approx(1 / np.log2(3) / 2)
    assert found["b"]["hr@10/sid"].mean == 0
    assert found["b"]["mrr@20/sid"].mean == pytest.approx(1 / 13 / 2)
    short = by_segment(ranks, masks, width=4, resamples=100)
    assert set(short["a"]) == {f"{m}@4/{level}" for m in ("hr", "ndcg", "mrr")
                               for level in ("sid", "item")}  # fmt: skip
