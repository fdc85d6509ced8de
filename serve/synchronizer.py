"""Keep a replica in step: with training, with the other replicas, and with its operator.

Deltas and pins go through the shared state; policies are read from their folders. One change
happens at a time, and none while a search that it would affect runs.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import numpy as np

from orchard.errors import DataError
from orchard.guide.events import Events
from serve.catalog.events import EventStore, trimmed
from serve.catalog.ledger import LedgerError
from serve.catalog.schema import AssignedItem, DeltaRequest, EventsInfo, EventsRequest
from serve.catalog.store import CatalogStore, CatalogVersion
from serve.decoding.scheduler import DecodeScheduler
from serve.errors import ConflictError, UnavailableError, UnknownNameError, UnprocessableError
from serve.policies.read import LoadedPolicy
from serve.policies.slot import LATEST, PolicySlot
from serve.schema import ActivateRequest
from serve.shared_state import SharedState

_log = logging.getLogger("orchard.serve")
_ATTEMPTS = 5
"""Number of times that events are written, each time after those of another replica."""


class Synchronizer:
    """Changes of a replica's catalog and policies. Belongs to one event loop."""

    def __init__(
        self,
        slots: Mapping[str, PolicySlot],
        catalog_store: CatalogStore,
        shared_state: SharedState,
        scheduler: DecodeScheduler,
        in_loader: Callable[..., Awaitable[Any]],
    ) -> None:
        """Change `slots` and `catalog_store` as `shared_state` and the policies' folders say.

        `in_loader(call, *args)` runs a blocking call in the loader thread, one at a time.
        """
        self.slots, self.catalog_store = slots, catalog_store
        self._shared_state, self._scheduler = shared_state, scheduler
        self._in_loader = in_loader
        self._changing = asyncio.Lock()
        self.catalog_refused = ""
        """Why newer catalog deltas are not applied, without paths; empty if they are."""
        self.event_store, self.events_refused = EventStore(), ""

    async def start(self) -> None:
        """Catch up with the other replicas.

        Raises:
            LedgerError: a delta cannot be applied.
        """
        await self._in_loader(self._shared_state.catch_up, self.catalog_store)
        await self._in_loader(self._shared_state.catch_up_events, self.event_store)
        await self._use_events()
        for slot in self.slots.values():
            await self._follow_pin(slot)

    async def count_events(self, request: EventsRequest) -> EventsInfo:
        """Add events to the counts of all guides, here and at all replicas.

        Raises:
            ApiError: no policy has a guide, or the events cannot be written.
        """
        if not any(slot.guide_digest for slot in self.slots.values()):
            raise UnprocessableError(
                "no policy of this endpoint has a guide that could count events; run "
                "`orchard fit guide`"
            )
        request = trimmed(request)
        async with self._changing:
            events = await self._append_events(request)
            self.event_store.activate(events)
            await self._use_events()
        named = {i for event in request.events for i in (*event.history, event.item)}
        _, known = self.catalog_store.current.catalog.lookup(np.array(sorted(named), np.int64))
        return EventsInfo(
            version=events.version, events=len(events), unknown_items=int((~known).sum())
        )

    async def _append_events(self, request: EventsRequest) -> Events:
        """Write events after those of all other replicas; return all of them."""
        attempts = 0
        while True:
            await self._catch_up_events()
            if self.events_refused:
                raise UnavailableError(
                    f"{self.events_refused}; the log of the endpoint says what to do"
                )
            events: Events = await self._in_loader(self.event_store.apply, request)
            try:
                await self._in_loader(self._shared_state.append_events, events.version, request)
                return events
            except ConflictError:  # another replica was first: its events come before
                attempts += 1
                if attempts == _ATTEMPTS:
                    raise
            except OSError as error:
                _log.exception("events %d are not written", events.version)
                raise UnavailableError(
                    "the events could not be written to the state folder; try again"
                ) from error

    async def _use_events(self) -> None:
        """Let the searches from now on use the current events."""
        catalog, events = self.catalog_store.current.catalog, self.event_store.current
        for slot in self.slots.values():
            await self._in_loader(slot.prepare, catalog, events)
            slot.events = events

    async def _catch_up_events(self) -> None:
        """Apply new events; if they cannot be, keep those of now, log why once, and remember it."""
        refused = ""
        try:
            await self._in_loader(self._shared_state.catch_up_events, self.event_store)
        except (LedgerError, OSError) as error:
            version = self.event_store.current.version
            refused = f"the ledger of the events is damaged after version {version}"
            if refused != self.events_refused:
                _log.error("the events stay at version %d: %s", version, error)
        self.events_refused = refused
        if any(s.events is not self.event_store.current for s in self.slots.values()):
            await self._use_events()

    async def change(self, delta: DeltaRequest) -> tuple[CatalogVersion, list[AssignedItem]]:
        """Apply a delta and, unless it is a dry run, publish it to all replicas.

        New items without a semantic ID get one before the delta is written, so that every replica
        reads the same.

        Returns:
            The version that the delta makes, and the semantic IDs that were assigned.

        Raises:
            ApiError: the delta is invalid, or was made for another version.
        """
        async with self._changing:
            await self._catch_up()
            if self.catalog_refused:
                raise UnavailableError(
                    f"{self.catalog_refused}; the log of the endpoint says what to do"
                )
            delta, assigned = await self._in_loader(self.catalog_store.with_sids, delta)
            catalog_version = await self._in_loader(self.catalog_store.apply, delta)
            if not delta.dry_run:
                try:
                    await self._in_loader(self._shared_state.append, catalog_version, delta)
                except OSError as error:
                    _log.exception("catalog version %d is not written", catalog_version.version)
                    raise UnavailableError(
                        "the delta could not be written to the state folder; try again"
                    ) from error
                for slot in self.slots.values():
                    await self._in_loader(slot.prepare, catalog_version.catalog, slot.events)
                self.catalog_store.activate(catalog_version)
            return catalog_version, assigned

    async def activate(self, request: ActivateRequest) -> None:
        """Pin an archived version of a variant's policy, or follow training again.

        Raises:
            ApiError: the variant or version does not exist, or the probe fails.
        """
        async with self._changing:
            if request.variant not in self.slots:
                raise UnknownNameError(
                    f"there is no variant {request.variant!r}; known: {', '.join(self.slots)}"
                )
            slot = self.slots[request.variant]
            if request.version == LATEST:
                slot.unpin()
            else:
                await self._pin(slot, request.version)
            pinned = None if request.version == LATEST else request.version
            await self._in_loader(self._shared_state.pin, slot.name, pinned)

    async def poll(self) -> None:
        """Poll the other replicas and training once."""
        async with self._changing:
            await self._catch_up()
            await self._catch_up_events()
            for slot in self.slots.values():
                await self._follow_pin(slot)
                loaded = await self._in_loader(slot.read_new_policy)
                if loaded is None:
                    continue
                if await self._switch(slot, loaded):
                    await self._in_loader(slot.archive, loaded)
                else:
                    _log.warning("variant %s keeps %s: %s", slot.name, slot.version, slot.refused)

    async def _catch_up(self) -> None:
        """Apply new deltas; if one cannot be, keep the catalog, log why once, and remember it."""
        refused = ""
        try:
            await self._in_loader(self._shared_state.catch_up, self.catalog_store)
        except (LedgerError, OSError) as error:
            version = self.catalog_store.current.version
            refused = f"the ledger of the catalog is damaged after version {version}"
            if refused != self.catalog_refused:
                _log.error("the catalog stays at version %d: %s", version, error)
        self.catalog_refused = refused

    async def _follow_pin(self, slot: PolicySlot) -> None:
        """Pin or unpin the slot as the shared state says."""
        try:
            pinned = await self._in_loader(self._shared_state.pinned, slot.name)
        except DataError:
            slot.refused = "the pin of this variant could not be read, and is not followed"
            return
        if pinned is None and slot.pinned is not None:
            slot.unpin()
        elif pinned is not None and pinned != slot.pinned:
            try:
                await self._pin(slot, pinned)
            except (UnknownNameError, ConflictError) as error:
                slot.refused = str(error)

    async def _pin(self, slot: PolicySlot, version: str) -> None:
        """Switch to an archived version and pin it; raise ConflictError if its probe fails."""
        loaded = await self._in_loader(slot.load_archived, version)
        if str(slot.version) != version and not await self._switch(slot, loaded):
            raise ConflictError(slot.refused)
        slot.pinned = version

    async def _switch(self, slot: PolicySlot, loaded: LoadedPolicy) -> bool:
        """Verify a policy and switch to it; return whether that succeeded.

        Once started, callers hold the lock that catalog changes also take, so that both calls below
        use the same catalog.
        """
        catalog = self.catalog_store.current.catalog
        expected = await self._in_loader(slot.reference_scores, loaded, catalog)
        if expected is None:
            return False
        return await self._scheduler.run_exclusive(slot.switch, loaded, catalog, expected)
