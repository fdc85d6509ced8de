"""Turn interaction logs into prediction examples and split them.

An example is a history, the item that followed, and a part (train, valid or test). Equal histories
with different targets remain different examples.

Shapes:  R examples   M items of all sequences   E events   U users   I items
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int64, Shaped

from orchard import ragged
from orchard.data.importers.log import InteractionLog, ItemTable, UserNames
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
    users: UserNames | None = None
    """Identifiers of the users in the source if they are not integers."""
    facts: Mapping[str, float | int] = field(default_factory=dict[str, float | int])
    """Statistics of the source, for the data card."""
    notes: tuple[str, ...] = ()
    """Use of every column, and guesses of the reader, in words."""
    context: Mapping[str, Shaped[np.ndarray, " M"]] = field(default_factory=dict[str, np.ndarray])
    """Context of the items of `sequence` by name: text, None where it is missing, or times."""

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

    Events of a user at one time are ordered by the identifier of the item, and examples of one time
    by that of the user, so that the order of the source does not matter.

    Raises:
        DataError: no user has two events, or a part has no examples.
    """
    rank = _ranks(log.items.item_id, log.items.key)[log.item]
    order = np.lexsort((rank, log.timestamp, log.user))
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
    user_rank = _ranks(log.user_id, log.user_key)[user[event]]
    event = event[np.lexsort((position[event], user_rank, timestamp[event]))]
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
        "events_at_the_time_of_the_users_event_before": int(
            ((np.diff(timestamp) == 0) & (np.diff(user) == 0)).sum()
        ),
        "largest_share_of_events_of_one_user": float(count.max() / len(log)),
        **log.counts,
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
        users=None if log.user_key is None else UserNames(user_id=log.user_id, key=log.user_key),
        facts=facts,
        notes=log.notes,
        context={name: values[order] for name, values in log.context.items()},
    )


def _ranks(number: Int64[np.ndarray, " N"], key: Sequence[str] | None) -> Int64[np.ndarray, " N"]:
    """Return the rank of each identifier, as a number or as text."""
    rank = np.empty(len(number), dtype=np.int64)
    rank[np.argsort(number if key is None else np.array(key, dtype=object), kind="stable")] = (
        np.arange(len(number))
    )
    return rank


def _repeats(
    user: Int64[np.ndarray, " E"], item: Int64[np.ndarray, " E"], time: Int64[np.ndarray, " E"]
) -> int:
    """Count the events whose user, item and time equal those of an earlier event."""
    order = np.lexsort((item, time, user))
    same = np.ones(max(0, len(user) - 1), dtype=bool)
    for column in (user, item, time):
        same &= np.diff(column[order]) == 0
    return int(same.sum())
