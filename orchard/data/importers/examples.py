"""Prediction examples: a history, the item that followed, and the part of the data they are in.

Equal histories with different targets are different examples, and stay so.

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
"""Where in time order train ends and where valid does."""

Split = Literal["chronological", "leave_one_out", "given"]


@dataclass(frozen=True, kw_only=True)
class SplitExamples:
    """Histories are ranges of `sequence`; of each part in the order they are written."""

    items: ItemTable
    sequence: Int64[np.ndarray, " M"]
    """Rows of `items`."""
    first: Int64[np.ndarray, " R"]
    """Where in `sequence` the history begins."""
    length: Int64[np.ndarray, " R"]
    """Items in the history, at least one."""
    target: Int64[np.ndarray, " R"]
    user_id: Int64[np.ndarray, " R"]
    timestamp: Int64[np.ndarray, " R"] | None
    """Of the target."""
    part: Int64[np.ndarray, " R"]
    """Index into `PARTS`."""
    whole: Bool[np.ndarray, " R"]
    """The history reaches back to the user's first item."""
    split: Split
    facts: Mapping[str, float | int] = field(default_factory=dict[str, float | int])
    """Of what they were made from."""

    def __len__(self) -> int:
        return len(self.target)

    def history(
        self, rows: Int64[np.ndarray, " K"]
    ) -> tuple[Int64[np.ndarray, " H"], Int64[np.ndarray, " K1"]]:
        """The histories of some examples, as a ragged array."""
        count = self.length[rows]
        return self.sequence[ragged.ranges(self.first[rows], count)], ragged.starts(count)


def of_log(log: InteractionLog, *, split: Split, max_history: int) -> SplitExamples:
    """Every event of a user but the first, predicted from at most `max_history` before it.

    `chronological` sorts the examples of all users by time and cuts them 8 : 1 : 1, so that a user
    may be in all parts. `leave_one_out` tests on a user's last event, validates on the one before,
    and trains on the rest; users with two events are trained on alone.

    Raises:
        DataError: no user has two events, or a part has no examples.
    """
    order = np.lexsort((log.timestamp, log.user))  # stable: equal times keep the file's order
    user, sequence, timestamp = log.user[order], log.item[order], log.timestamp[order]
    start = ragged.starts(np.bincount(user, minlength=len(log.user_id)))
    place = ragged.places(start)
    event = np.flatnonzero(place > 0)
    count = np.diff(start)
    if len(event) == 0:
        raise DataError(
            f"each of the {len(log.user_id)} users has one interaction; an example needs two"
        )
    event = event[np.lexsort((place[event], user[event], timestamp[event]))]
    if split == "chronological":
        bounds = [int(share * len(event)) for share in SHARES]
        part = np.searchsorted(bounds, np.arange(len(event)), side="right").astype(np.int64)
    else:
        left = count[user[event]] - 1 - place[event]
        part = np.where((left > 1) | (count[user[event]] == 2), 0, 2 - left)
    for index, name in enumerate(PARTS):
        if not (part == index).any():
            raise DataError(
                f"{len(event)} examples of {len(count)} users leave none for {name} in a "
                f"{split.replace('_', '-')} split; bring more interactions or choose another split"
            )
    length = np.minimum(place[event], max_history)
    pairs = np.unique(user * len(log.items) + sequence)
    facts: dict[str, float | int] = {
        "num_events": len(log),
        "num_users": len(count),
        "num_items": len(log.items),
        "sparsity": 1 - len(pairs) / len(log.items) / len(count),
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
        whole=length == place[event],
        split=split,
        facts=facts,
    )


def _repeats(
    user: Int64[np.ndarray, " E"], item: Int64[np.ndarray, " E"], time: Int64[np.ndarray, " E"]
) -> int:
    """Events that an earlier one has user, item and time in common with."""
    order = np.lexsort((item, time, user))
    same = np.ones(max(0, len(user) - 1), dtype=bool)
    for column in (user, item, time):
        same &= np.diff(column[order]) == 0
    return int(same.sum())


def leaks(examples: SplitExamples) -> Int64[np.ndarray, " K"]:
    """Examples of valid and test whose target is an interaction inside a training history.

    Of a user's histories that reach back to his first item, the place in the sequence tells one
    interaction from another; of the rest, the time does, where it is known. An item that was merely
    met twice is no leak.
    """
    train = np.flatnonzero(examples.part == 0)
    held = np.flatnonzero(examples.part > 0)
    found = [_later(examples, train, held)] if examples.timestamp is not None else []
    train, held = train[examples.whole[train]], held[examples.whole[held]]
    return np.unique(np.concatenate([*found, _inside(examples, train, held)]))


def _inside(
    examples: SplitExamples, train: Int64[np.ndarray, " A"], held: Int64[np.ndarray, " B"]
) -> Int64[np.ndarray, " K"]:
    """Held examples whose place in the sequence the user's longest training history holds."""
    longest, held = _last_of_user(examples, train, held, examples.length)
    place = examples.length[held]
    reaches = examples.length[longest] > place
    longest, held, place = longest[reaches], held[reaches], place[reaches]
    met = examples.sequence[examples.first[longest] + place]
    return held[met == examples.target[held]]


def _later(
    examples: SplitExamples, train: Int64[np.ndarray, " A"], held: Int64[np.ndarray, " B"]
) -> Int64[np.ndarray, " K"]:
    """Held examples that precede the user's last training example, whose history has the item."""
    assert examples.timestamp is not None
    last, held = _last_of_user(examples, train, held, examples.timestamp)
    after = examples.timestamp[last] > examples.timestamp[held]
    last, held = last[after], held[after]
    item, start = examples.history(last)
    owner = ragged.owners(start)
    met = np.bincount(owner, item == examples.target[held][owner], minlength=len(held))
    return held[met > 0]


def _last_of_user(
    examples: SplitExamples,
    train: Int64[np.ndarray, " A"],
    held: Int64[np.ndarray, " B"],
    by: Int64[np.ndarray, " R"],
) -> tuple[Int64[np.ndarray, " K"], Int64[np.ndarray, " K"]]:
    """For held examples of users in train: the user's training example of largest `by`; both."""
    none = np.zeros(0, dtype=np.int64)
    if len(train) == 0 or len(held) == 0:
        return none, none
    order = train[np.lexsort((by[train], examples.user_id[train]))]
    user = examples.user_id[order]
    at = np.searchsorted(user, examples.user_id[held], side="right") - 1
    known = (at >= 0) & (user[at.clip(0)] == examples.user_id[held])
    return order[at[known]], held[known]
