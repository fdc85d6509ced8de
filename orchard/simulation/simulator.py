"""Interface of a simulator of users, and the arrays that it exchanges with its clients.

Time passes in *windows*. In each, some users *visit*: they ask for items, and respond to the list
that they are shown with events. A simulator is a function of its seed and of the events so far, so
that a window that is simulated again gives the same visits, and equal lists get equal responses.

Shapes:  R visits   R1 = R + 1   H history items of all visits   M shown items of all visits
         E events
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import polars as pl
from jaxtyping import Float64, Int64

CLICK, BUY = "click", "buy"
"""Behaviors of events."""
LOOK_S = 1e-3
"""Seconds that a user takes to look at one item; short, since simulated windows are."""


@dataclass(frozen=True, kw_only=True)
class Visits:
    """Users who ask for items in one window, by time."""

    window: int
    """Number of the window, 0 for the first."""
    user: Int64[np.ndarray, " R"]
    time: Float64[np.ndarray, " R"]
    """Seconds since 1970."""
    history: Int64[np.ndarray, " H"]
    """Item ids, oldest first; those of visit r are `history_start[r] : history_start[r + 1]`."""
    history_start: Int64[np.ndarray, " R1"]

    def __len__(self) -> int:
        """Return the number of visits."""
        return len(self.user)

    def history_of(self, visit: int) -> list[int]:
        """Return the history of one visit."""
        return self.history[self.history_start[visit] : self.history_start[visit + 1]].tolist()


@dataclass(frozen=True, kw_only=True)
class ShownLists:
    """Items that each visit was shown, best first; a visit that got no answer was shown none."""

    request_id: tuple[str, ...]
    item: Int64[np.ndarray, " M"]
    start: Int64[np.ndarray, " R1"]


@runtime_checkable
class Simulator(Protocol):
    """Users who visit, respond to what they are shown, and remember it."""

    def visits(self, window: int) -> Visits:
        """Return who visits in a window, with the histories after all remembered events."""
        ...

    def respond(self, visits: Visits, shown: ShownLists) -> pl.DataFrame:
        """Return the events of all visits in the columns of `orchard.feedback.schema.EVENTS`."""
        ...

    def remember(self, events: pl.DataFrame) -> None:
        """Take the events of a window into the histories of the users, in the given order."""
        ...

    def expected_reward(self, visits: Visits, shown: ShownLists) -> Float64[np.ndarray, " R"]:
        """Return the expected sum of event values of each visit, over all its responses."""
        ...


def shown_lists(request_id: Sequence[str], lists: Sequence[Sequence[int]]) -> ShownLists:
    """Make `ShownLists` of one list of item ids per visit."""
    start = np.zeros(len(lists) + 1, dtype=np.int64)
    start[1:] = np.cumsum([len(each) for each in lists])
    flat = [item for each in lists for item in each]
    return ShownLists(
        request_id=tuple(request_id), item=np.array(flat, dtype=np.int64), start=start
    )
