"""Compute the data card: counts, split, sparsity, lengths, and overlap of test with train."""

from collections.abc import Mapping

import numpy as np

from orchard import ragged
from orchard.data.importers.examples import PARTS, SplitExamples
from orchard.data.importers.leaks import copies, leaks
from orchard.errors import DataError

CARD = "card.json"
MOST_COPIES = 0.5
"""Largest share of a given part whose history and target another user may have in train."""


def facts(examples: SplitExamples) -> Mapping[str, float]:
    """Compute counts, shares and lengths of the examples that are to be written.

    Raises:
        DataError: an interaction of valid or test is inside a training history.
    """
    check_leaks(examples)
    train_users = np.unique(examples.user_id[examples.part == 0])
    test_users = examples.user_id[examples.part == 2]
    titles = examples.items.title or ("",) * len(examples.items)
    values: dict[str, float | int] = {
        **examples.facts,
        **split_facts(examples),
        "test_users_in_train": float(np.isin(test_users, train_users).mean()),
        "items_without_title": sum(not title for title in titles),
        # `check_leaks` has counted them and refuses all but none.
        "interactions_of_valid_or_test_in_train": len(leaks(examples)),
        "held_out_rows_that_another_user_has_in_train": len(copies(examples)[1]),
    }
    return {name: float(value) for name, value in values.items()}


def split_facts(examples: SplitExamples) -> Mapping[str, float]:
    """Compute the numbers of examples, lengths of histories and overlap of test with train."""
    test = np.flatnonzero(examples.part == 2)
    train_targets = examples.target[examples.part == 0]
    item, start = examples.history(test)
    owner = ragged.row_of(start)
    repeats_history = (
        np.bincount(owner, item == examples.target[test][owner], minlength=len(test)) > 0
    )
    return {
        **{f"{name}_rows": float((examples.part == i).sum()) for i, name in enumerate(PARTS)},
        "history_mean": float(examples.length.mean()),
        "history_median": float(np.median(examples.length)),
        "history_max": float(examples.length.max()),
        "test_targets_in_history": float(repeats_history.mean()),
        "test_targets_seen_in_train": float(np.isin(examples.target[test], train_targets).mean()),
    }


def check_leaks(examples: SplitExamples) -> None:
    """Raise DataError if a training example shows an interaction of valid or test."""
    found, of_others = copies(examples)
    whose = "of the same user"
    for part in (1, 2) if examples.split == "given" else ():
        copied = of_others[examples.part[of_others] == part]
        if len(copied) > MOST_COPIES * (examples.part == part).sum() and len(found) == 0:
            found, whose = copied, "of another user"
    if len(found):
        raise DataError(
            f"{_name(examples, int(found[0]))} is a row of train as well, {whose}, with history "
            f"and target ({len(found)} such rows of valid and test); remove them from train, or "
            "split the data again"
        )
    leaking = leaks(examples)
    if len(leaking) == 0:
        return
    row = int(leaking[0])
    raise DataError(
        f"{_name(examples, row)} predicts item {examples.items.name(int(examples.target[row]))} of "
        f"user {examples.user_id[row]}, an interaction inside a training history of that user "
        f"({len(leaking)} such rows); split the data again"
    )


def _name(examples: SplitExamples, row: int) -> str:
    """Return the row of an example in its part."""
    part = int(examples.part[row])
    return f"row {int((examples.part[:row] == part).sum())} of {PARTS[part]}"
