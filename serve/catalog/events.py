"""Events of an endpoint: what was bought after what since its guides were fitted.

They come under versions of their own, as the deltas of the catalog do, so that the catalog's
versions and what is kept for a rollback do not depend on them.

Shapes:  H history items   E events   E1 = E + 1
"""

import numpy as np

from orchard import ragged
from orchard.guide.events import NONE, Events
from serve.catalog.schema import EventsRequest

COUNTED = 50
"""Number of history items of an event that any expert counts."""


def trimmed(request: EventsRequest) -> EventsRequest:
    """Return a request without the history items that no expert counts."""
    events = [e.model_copy(update={"history": e.history[-COUNTED:]}) for e in request.events]
    return request.model_copy(update={"events": events})


class EventStore:
    """Current events of a replica."""

    def __init__(self) -> None:
        """Start without events."""
        self.current = NONE

    def apply(self, request: EventsRequest) -> Events:
        """Return the next version of the events; the current one stays until `activate`."""
        history = [np.array(event.history, np.int64) for event in request.events]
        return self.current.followed_by(
            np.concatenate([np.zeros(0, np.int64), *history]),
            ragged.starts(np.array([len(items) for items in history], np.int64)),
            np.array([event.item for event in request.events], np.int64),
            forget=request.forget,
        )

    def activate(self, events: Events) -> None:
        """Make events that `apply` has built the current ones."""
        assert events.version == self.current.version + 1
        self.current = events
