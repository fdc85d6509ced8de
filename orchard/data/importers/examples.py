"""Turn interaction logs into prediction examples, split them, and check the split for leaks.

An example is a history, the item that followed, and a part (train, valid or test). Equal histories
with different targets remain different examples.

Shapes:  R examples   M items of all sequences   E events   U users   I items
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int64

from orchard import ragged
from orchard.data.importers.log import InteractionLog, ItemTable
from orchard.errors import DataError

PARTS = ("train", "valid", "test")
SHARES = (0.8, 0.9)
"""End of train and end of valid, as shares of all examples in time order."""

Split = Literal["chronological", "leave_one_out", "given"]


@dataclass(frozen=True, kw_only=True)
class SplitExamples:
    """Examples of all parts, each part in the order in which it is written."""

    items: ItemTable
    sequence: Int64[np.ndarray, " M"]
    """Items of all users' sequences as rows of `items`; histories are ranges of this array."""
    first: Int64[np.ndarray, " R"]
    """Position in `sequence` of the first item of each history."""
    length: Int64[np.ndarray, " R"]
    """Number of items in each history, at least one."""
    target: Int64[np.ndarray, " R"]
    """Target items as rows of `items`."""
    user_id: Int64[np.ndarray, " R"]
    timestamp: Int64[np.ndarray, " R"] | None
    """Time of each target, if known."""
    part: Int64[np.ndarray, " R"]
    """Part of each example, as an index into `PARTS`."""
    whole: Bool[np.ndarray, " R"]
    """Whether the history reaches back to the user's first item."""
    split: Split
    """Rule by which the examples were assigned to parts."""
    facts: Mapping[str, float | int] = field(default_factory=dict[str, float | int])
    """Statistics of the source, for the data card."""

    def __len__(self) -> int:
        return len(self.target)

    def history(
        self, rows: Int64[np.ndarray, " K"]
    ) -> tuple[Int64[np.ndarray, " H"], Int64[np.ndarray, " K1"]]:
        """Return the histories of the selected examples as a ragged array."""
        count = self.length[rows]
        return self.sequence[ragged.ranges(self.first[rows], count)], ragged.starts(count)


def of_log(log: InteractionLog, *, split: Split, max_history: int) -> SplitExamples:
    """Make an example of every event but a user's first, with up to `max_history` events before it.

    `chronological` sorts the examples of all users by time and splits them 8 : 1 : 1, so a user
    may occur in all parts. `leave_one_out` tests on a user's last event, validates on the one
    before, and trains on the rest; a user with two events occurs in train only.

    Raises:
        DataError: no user has two events, or a part has no examples.
    """
    order = np.lexsort((log.timestamp, log.user))  # stable: equal times keep the file's order
    user, sequence, timestamp = log.user[order], log.item[order], log.timestamp[order]
    start = ragged.starts(np.bincount(user, minlength=len(log.user_id)))
    position = ragged.index_in_row(start)
    event = np.flatnonzero(position > 0)
    count = np.diff(start)
    if len(event) == 0:
        raise DataError(
            f"each of the {len(log.user_id)} users has one interaction; an example needs two"
        )
    # event of each example's target, in the order of time, user and position
    event = event[np.lexsort((position[event], user[event], timestamp[event]))]
    if split == "chronological":
        bounds = [int(share * len(event)) for share in SHARES]
        part = np.searchsorted(bounds, np.arange(len(event)), side="right").astype(np.int64)
    else:
        events_left = count[user[event]] - 1 - position[event]
        part = np.where((events_left > 1) | (count[user[event]] == 2), 0, 2 - events_left)
    for index, name in enumerate(PARTS):
        if not (part == index).any():
            raise DataError(
                f"{len(event)} examples of {len(count)} users leave none for {name} in a "
                f"{split.replace('_', '-')} split; bring more interactions or choose another split"
            )
    length = np.minimum(position[event], max_history)
    user_item = np.unique(user * len(log.items) + sequence)
    facts: dict[str, float | int] = {
        "num_events": len(log),
        "num_users": len(count),
        "num_items": len(log.items),
        "sparsity": 1 - len(user_item) / len(log.items) / len(count),
        "users_with_one_event": int((count == 1).sum()),
        "events_repeating_one_of_the_same_time": _repeats(user, sequence, timestamp),
        **log.dropped,
    }
    return SplitExamples(
        items=log.items,
        sequence=sequence,
        first=event - length,
        length=length,
        target=sequence[event],
        user_id=log.user_id[user[event]],
        timestamp=timestamp[event],
        part=part,
        whole=length == position[event],
        split=split,
        facts=facts,
    )


def _repeats(
    user: Int64[np.ndarray, " E"], item: Int64[np.ndarray, " E"], time: Int64[np.ndarray, " E"]
) -> int:
    """Count the events whose user, item and time equal those of an earlier event."""
    order = np.lexsort((item, time, user))
    same = np.ones(max(0, len(user) - 1), dtype=bool)
    for column in (user, item, time):
        same &= np.diff(column[order]) == 0
    return int(same.sum())


def leaks(examples: SplitExamples) -> Int64[np.ndarray, " K"]:
    """Return the examples of valid and test whose target is inside a training history.

    For histories that reach back to the user's first item, the position in the sequence identifies
    an interaction; for the others the time does, if known. An item that a user merely interacted
    with twice is not a leak.
    """
    train = np.flatnonzero(examples.part == 0)
    held_out = np.flatnonzero(examples.part > 0)
    leaking = [_later(examples, train, held_out)] if examples.timestamp is not None else []
    train, held_out = train[examples.whole[train]], held_out[examples.whole[held_out]]
    return np.unique(np.concatenate([*leaking, _inside(examples, train, held_out)]))


def _inside(
    examples: SplitExamples, train: Int64[np.ndarray, " A"], held_out: Int64[np.ndarray, " B"]
) -> Int64[np.ndarray, " K"]:
    """Return the held-out examples whose position the user's longest training history covers."""
    longest, held_out = _last_of_user(examples, train, held_out, examples.length)
    position = examples.length[held_out]
    # The user's sequence begins at `first`, so the item at `position` is the held-out interaction.
    is_longer = examples.length[longest] > position
    longest, held_out, position = longest[is_longer], held_out[is_longer], position[is_longer]
    item_there = examples.sequence[examples.first[longest] + position]
    return held_out[item_there == examples.target[held_out]]


def _later(
    examples: SplitExamples, train: Int64[np.ndarray, " A"], held_out: Int64[np.ndarray, " B"]
) -> Int64[np.ndarray, " K"]:
    """Return the held-out examples that precede a training example whose history has the target."""
    assert examples.timestamp is not None
    last_train, held_out = _last_of_user(examples, train, held_out, examples.timestamp)
    is_later = examples.timestamp[last_train] > examples.timestamp[held_out]
    last_train, held_out = last_train[is_later], held_out[is_later]
    item, start = examples.history(last_train)
    owner = ragged.row_of(start)
    matches = np.bincount(owner, item == examples.target[held_out][owner], minlength=len(held_out))
    return held_out[matches > 0]


def _last_of_user(
    examples: SplitExamples,
    train: Int64[np.ndarray, " A"],
    held_out: Int64[np.ndarray, " B"],
    by: Int64[np.ndarray, " R"],
) -> tuple[Int64[np.ndarray, " K"], Int64[np.ndarray, " K"]]:
    """Match held-out examples of users in train with the user's training example of largest `by`.

    Returns the training examples and the held-out examples, paired.
    """
    empty = np.zeros(0, dtype=np.int64)
    if len(train) == 0 or len(held_out) == 0:
        return empty, empty
    # training examples by user and, within a user, by `by`; then the last one of each user
    order = train[np.lexsort((by[train], examples.user_id[train]))]
    user = examples.user_id[order]
    last = np.searchsorted(user, examples.user_id[held_out], side="right") - 1
    has_train = (last >= 0) & (user[last.clip(0)] == examples.user_id[held_out])
    return order[last[has_train]], held_out[has_train]
