"""Represent interaction logs (user, item, time) and filter them.

Shapes:  E events   U users   I items
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Bool, Int64, Shaped

from orchard.errors import DataError


@dataclass(frozen=True, kw_only=True)
class ItemTable:
    """Items by row number, as used in `InteractionLog.item` and in `SplitExamples`."""

    item_id: Int64[np.ndarray, " I"]
    """Identifiers of the source if they are integers, else consecutive numbers."""
    key: tuple[str, ...] | None = None
    """Identifiers of the source if they are not integers."""
    title: tuple[str, ...] = ()
    """Titles, with empty strings where unknown; empty if no item has one."""
    sid: tuple[tuple[int, ...], ...] | None = None
    """Semantic IDs, if the source has them."""

    def __len__(self) -> int:
        return len(self.item_id)

    def name(self, row: int) -> str:
        """Return the item's identifier in the source, for messages."""
        return self.key[row] if self.key is not None else str(self.item_id[row])

    def names(self) -> Sequence[str]:
        """Return the identifiers of all items in the source, as text."""
        return self.key if self.key is not None else [str(i) for i in self.item_id.tolist()]

    def take(self, rows: Int64[np.ndarray, " K"]) -> "ItemTable":
        """Select items by row; consecutive numbers are assigned anew."""
        chosen = rows.tolist()
        return ItemTable(
            item_id=self.item_id[rows] if self.key is None else np.arange(len(rows)),
            key=None if self.key is None else tuple(self.key[row] for row in chosen),
            title=tuple(self.title[row] for row in chosen) if self.title else (),
            sid=None if self.sid is None else tuple(self.sid[row] for row in chosen),
        )


@dataclass(frozen=True, kw_only=True)
class UserNames:
    """Identifiers of users in the source, where they are not integers."""

    user_id: Int64[np.ndarray, " U"]
    key: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class InteractionLog:
    """Events in the order of the source."""

    user: Int64[np.ndarray, " E"]
    """User of each event, as a row of `user_id`."""
    item: Int64[np.ndarray, " E"]
    """Item of each event, as a row of `items`."""
    timestamp: Int64[np.ndarray, " E"]
    """Time of each event in any unit that increases with time."""
    user_id: Int64[np.ndarray, " U"]
    """Identifiers of the source if they are integers, else consecutive numbers."""
    items: ItemTable
    user_key: tuple[str, ...] | None = None
    """Identifiers of the users in the source if they are not integers."""
    counts: Mapping[str, int] = field(default_factory=dict[str, int])
    """Numbers of events, users or items that were changed or are implausible, by reason."""
    notes: tuple[str, ...] = ()
    """Use of every column, and guesses of the reader, in words."""
    dropped: Mapping[str, int] = field(default_factory=dict[str, int])
    """Number of events, users or items removed so far, by reason."""
    context: Mapping[str, Shaped[np.ndarray, " E"]] = field(default_factory=dict[str, np.ndarray])
    """Context of the events by name: text, None where it is missing, or times."""

    def __len__(self) -> int:
        return len(self.item)

    def keep(self, events: Bool[np.ndarray, " E"], reason: str) -> "InteractionLog":
        """Select events, and the users and items that have at least one of them."""
        user, user_of = np.unique(self.user[events], return_inverse=True)
        item, item_of = np.unique(self.item[events], return_inverse=True)
        left_out = {reason: int((~events).sum())} if not events.all() else {}
        return replace(
            self,
            user=user_of.reshape(-1),
            item=item_of.reshape(-1),
            timestamp=self.timestamp[events],
            user_id=self.user_id[user],
            user_key=(
                None if self.user_key is None else tuple(self.user_key[u] for u in user.tolist())
            ),
            items=self.items.take(item),
            dropped={**self.dropped, **left_out},
            context={name: values[events] for name, values in self.context.items()},
        )


def k_core(log: InteractionLog, k: int) -> InteractionLog:
    """Select the largest subset in which every user and every item has at least `k` events.

    Raises:
        DataError: nothing is left.
    """
    kept = np.ones(len(log), dtype=bool)
    while True:
        of_user = np.bincount(log.user[kept], minlength=len(log.user_id))
        of_item = np.bincount(log.item[kept], minlength=len(log.items))
        enough = kept & (of_user[log.user] >= k) & (of_item[log.item] >= k)
        if enough.sum() == kept.sum():
            break
        kept = enough
    if not kept.any():
        raise DataError(
            f"no user and item of the {len(log)} interactions are left with {k} interactions each; "
            "lower --core"
        )
    return log.keep(kept, f"events_outside_the_{k}_core")


def titled(log: InteractionLog, *, most_words: int) -> InteractionLog:
    """Select the events of items with a title of 1 to `most_words` words, as MiniOneRec does.

    Raises:
        DataError: no item has such a title.
    """
    num_words = np.array(
        [len(title.split()) for title in log.items.title or ("",) * len(log.items)]
    )
    usable = (num_words > 0) & (num_words <= most_words)
    if not usable.any():
        raise DataError(
            f"none of the {len(log.items)} items has a title of 1 to {most_words} words; give the "
            "metadata file with --items, or raise --title-words"
        )
    return log.keep(usable[log.item], "events_of_items_without_a_usable_title")


def with_titles(
    items: ItemTable, key: Sequence[str], title: Sequence[str], *, first_counts: bool = False
) -> ItemTable:
    """Attach titles to the items by identifier; items without one keep the title that they have.

    Raises:
        DataError: an item is listed twice with two titles, unless the first one counts.
    """
    title_of_item: dict[str, str] = {}
    for item_id, text in zip(key, title, strict=True):
        known = title_of_item.get(item_id)
        if known is None or (first_counts and not known):
            title_of_item[item_id] = text
        elif known != text and not first_counts:
            raise DataError(
                f"item {item_id} is listed twice, as {known!r} and as {text!r}; "
                "keep one row per item"
            )
    known_titles = items.title or ("",) * len(items)
    return replace(
        items,
        title=tuple(
            title_of_item.get(item_id) or known
            for item_id, known in zip(items.names(), known_titles, strict=True)
        ),
    )
