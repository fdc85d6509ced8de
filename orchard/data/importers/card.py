"""Compute the data card: counts, split, sparsity, lengths, and overlap of test with train."""

from collections.abc import Mapping

import numpy as np

from orchard import ragged
from orchard.data.importers.examples import PARTS, SplitExamples, leaks
from orchard.errors import DataError

CARD = "card.json"


def facts(examples: SplitExamples) -> Mapping[str, float]:
    """Compute counts, shares and lengths of the examples that are to be written.

    Raises:
        DataError: an interaction of valid or test is inside a training history.
    """
    check_leaks(examples)
    test = np.flatnonzero(examples.part == 2)
    train_targets = examples.target[examples.part == 0]
    item, start = examples.history(test)
    owner = ragged.row_of(start)
    repeats_history = (
        np.bincount(owner, item == examples.target[test][owner], minlength=len(test)) > 0
    )
    train_users = np.unique(examples.user_id[examples.part == 0])
    titles = examples.items.title or ("",) * len(examples.items)
    values: dict[str, float | int] = {
        **examples.facts,
        **{f"{name}_rows": int((examples.part == i).sum()) for i, name in enumerate(PARTS)},
        "history_mean": float(examples.length.mean()),
        "history_median": float(np.median(examples.length)),
        "history_max": int(examples.length.max()),
        "test_targets_in_history": float(repeats_history.mean()),
        "test_targets_seen_in_train": float(np.isin(examples.target[test], train_targets).mean()),
        "test_users_in_train": float(np.isin(examples.user_id[test], train_users).mean()),
        "items_without_title": sum(not title for title in titles),
        "interactions_of_valid_or_test_in_train": 0,
    }
    return {name: float(value) for name, value in values.items()}


def check_leaks(examples: SplitExamples) -> None:
    """Raise DataError if a training history contains an interaction of valid or test."""
    leaking = leaks(examples)
    if len(leaking) == 0:
        return
    row = int(leaking[0])
    part = int(examples.part[row])
    item = examples.items.name(int(examples.target[row]))
    row_in_part = int((examples.part[:row] == part).sum())
    raise DataError(
        f"row {row_in_part} of {PARTS[part]} predicts item {item} of user "
        f"{examples.user_id[row]}, an interaction inside a training history of that user "
        f"({len(leaking)} such rows); split the data anew"
    )
