"""Rows of valid or test that are copied into train are found by their whole content."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchard.data.importers.card import check_leaks, facts
from orchard.data.importers.examples import SplitExamples, of_log
from orchard.data.importers.leaks import copies, leaks
from orchard.data.importers.log import ItemTable
from orchard.errors import DataError
from tests.fixtures.logs import log_of

Row = tuple[int, list[int], int]


def splits_of(train: list[Row], valid: list[Row], test: list[Row]) -> SplitExamples:
    rows = [*train, *valid, *test]
    length = np.array([len(history) for _, history, _ in rows])
    return SplitExamples(
        items=ItemTable(item_id=np.arange(30)),
        sequence=np.array([item for _, history, _ in rows for item in history]),
        first=np.cumsum(length) - length,
        length=length,
        target=np.array([target for _, _, target in rows]),
        user_id=np.array([user for user, _, _ in rows]),
        timestamp=None,
        part=np.repeat(np.arange(3), [len(train), len(valid), len(test)]),
        whole=length < length.max(),
        split="given",
    )


TRAIN: list[Row] = [(1, [0], 1), (1, [0, 1], 2), (2, [4, 5, 6, 7], 8)]
VALID: list[Row] = [(1, [0, 1, 2], 3)]
TEST: list[Row] = [(1, [0, 1, 2, 3], 9), (2, [4, 5, 6, 7, 8], 0)]


def test_a_sound_split_has_no_copies() -> None:
    examples = splits_of(TRAIN, VALID, TEST)
    assert [len(found) for found in copies(examples)] == [0, 0]
    assert facts(examples)["interactions_of_valid_or_test_in_train"] == 0


@pytest.mark.parametrize("part", ["valid", "test"])
def test_copied_rows_are_refused_and_counted(part: str) -> None:
    copied = VALID if part == "valid" else TEST
    examples = splits_of([*TRAIN, *copied], VALID, TEST)
    assert len(copies(examples)[0]) == len(copied)
    message = rf"row 0 of {part} is a row of train .* same user.*\({len(copied)} such rows"
    with pytest.raises(DataError, match=message):
        check_leaks(examples)


def test_copies_under_other_users_are_counted_and_refused_if_they_are_most_of_a_part() -> None:
    others = [(user + 50, history, target) for user, history, target in TEST]
    with pytest.raises(
        DataError, match=r"row 0 of test is a row of train as well, of another user"
    ):
        check_leaks(splits_of([*TRAIN, *others], VALID, TEST))
    more = [(3, [20 + i, 21, 22], i) for i in range(4)]
    assert facts(splits_of([*TRAIN, others[0]], VALID, [*TEST, *more]))[
        "held_out_rows_that_another_user_has_in_train"
    ] == 1  # fmt: skip


def test_meeting_two_items_twice_in_a_row_is_no_copy() -> None:
    cut = splits_of([(1, [5, 6], 7), (2, [1, 2], 3)], [(1, [5, 6], 7)], [(2, [3, 4], 5)])
    assert len(leaks(cut)) == 0  # histories of the longest length may have been cut
    assert len(leaks(replace(cut, whole=np.ones(4, dtype=bool)))) == 1


def test_order_and_length_of_a_history_are_its_content() -> None:
    test = [(1, [1, 0, 2], 3), (1, [0, 1, 2, 0], 3), (1, [1, 2], 3), (1, [0, 1, 2], 4)]
    examples = splits_of([(1, [0, 1, 2], 3), (9, [0] * 6, 1)], VALID, test)
    assert [examples.part[row] for row in copies(examples)[0]] == [1]


@pytest.mark.slow
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 9)), min_size=25, max_size=60
    )
)
@example([(0, 0, 0)] * 25)  # a log may list an event many times
@settings(max_examples=25)
@pytest.mark.parametrize("split", ["chronological", "leave_one_out"])
def test_our_splits_never_leak(split: Any, rows: list[tuple[int, int, int]]) -> None:
    log = log_of([*rows, *((u, 0, t) for u in range(4) for t in range(3))])  # enough to split
    assert len(leaks(of_log(log, split=split, max_history=4))) == 0


def test_time_finds_leaks_of_histories_that_were_cut() -> None:
    examples = of_log(
        log_of([(0, i % 9, i) for i in range(30)]), split="chronological", max_history=4
    )
    check_leaks(examples)
    # A training row that is later than all of test, and holds the four events before it.
    last = int(np.flatnonzero(examples.part == 2)[-1])
    swapped = np.where(np.arange(len(examples)) == last, 0, examples.part)
    leaky = replace(examples, part=swapped)
    assert leaks(leaky).tolist() == [last - 4, last - 3, last - 2, last - 1]
