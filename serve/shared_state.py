"""State shared by the replicas of an endpoint: deltas, events and pins, as files in one folder.

A replica that starts later applies all deltas of the ledger and so reaches the same catalog.
"""

import json
import logging
import uuid
from pathlib import Path

from orchard.catalog import catalog as catalogs
from orchard.catalog.catalog import Catalog
from orchard.errors import ConfigError, DataError
from orchard.folders import atomic_dir
from orchard.guide.events import Events
from orchard.policy.store import CATALOG
from orchard.semantic_ids.bundle import BUNDLE, Bundle
from serve.catalog.events import EventStore
from serve.catalog.ledger import Ledger
from serve.catalog.schema import DeltaRequest, EventsRequest
from serve.catalog.store import CatalogStore, CatalogVersion

_log = logging.getLogger("orchard.serve")
EVENTS = "events"
"""Mark of the ledger's entries that make no version of the catalog."""


class SharedState:
    """Shared folder of the replicas that serve one base catalog."""

    def __init__(self, folder: Path, catalog: str) -> None:
        """Open or create the folder; `catalog` is the digest of the catalog at version 0.

        Raises:
            ConfigError: the folder cannot be created.
        """
        self._folder = folder / catalog[:16]
        deltas, events = self._folder / "deltas", self._folder / "events"
        try:
            deltas.mkdir(parents=True, exist_ok=True)
            events.mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"the state folder {folder} cannot be written ({error.strerror}); set serve.state "
                "to a folder that all replicas can write"
            ) from error
        self._ledger = Ledger(deltas, catalog, DeltaRequest)
        self._events = Ledger(events, catalog, EventsRequest)

    @property
    def policies(self) -> Path:
        """Folder of archived policies."""
        return self._folder / "policies"

    def keep_catalog(self, catalog: Catalog, bundle: Bundle | None = None) -> None:
        """Keep the base catalog, so that an archived policy can be served without its folder.

        Its tokenizer bundle is kept as well; a newer one takes its place.
        """
        kept = self._folder / CATALOG
        try:
            if not kept.is_dir():
                with atomic_dir(kept) as partial:
                    catalogs.write(catalog, partial)
            kept = self._folder / BUNDLE
            if bundle is not None and bundle.folder != kept and not bundle.is_in(kept):
                bundle.copy(kept)
        except (OSError, DataError) as error:  # another replica keeps it at this moment
            _log.info("the catalog is not kept in %s: %s", kept, error)

    def append(self, catalog_version: CatalogVersion, delta: DeltaRequest) -> None:
        """Write the delta that makes a catalog version.

        Raises:
            ConflictError: another replica has already created that version.
        """
        self._ledger.append(catalog_version.version, delta, catalog_version.digest)

    def catch_up(self, catalog_store: CatalogStore) -> CatalogVersion:
        """Apply all new deltas to the store; return its current catalog version.

        Raises:
            LedgerError: a delta is missing, damaged, or does not make the version that it names.
        """
        while (entry := self._ledger.next_entry()) is not None:
            try:
                made = catalog_store.replay(entry.delta, self._ledger.operations)
            except DataError as error:
                why = f"does not fit the catalog ({error})"
                raise self._ledger.error(entry.version, why) from error
            if entry.makes and made.digest != entry.makes:
                why = f"makes version {made.digest[:8]} where it names {entry.makes[:8]}"
                raise self._ledger.error(entry.version, why)
            catalog_store.activate(made)
            self._ledger.advance(entry)
        return catalog_store.current

    def append_events(self, version: int, request: EventsRequest) -> None:
        """Write the events that make a version of the events.

        Raises:
            ConflictError: another replica has already created that version.
        """
        self._events.append(version, request, makes=EVENTS)

    def catch_up_events(self, store: EventStore) -> Events:
        """Apply all new events to the store; return its current ones.

        Raises:
            LedgerError: a file of events is missing or damaged.
        """
        while (entry := self._events.next_entry()) is not None:
            store.activate(store.apply(entry.delta))
            self._events.advance(entry)
        return store.current

    def verify(self) -> int:
        """Check the ledger without applying it; return its newest version or raise LedgerError."""
        return self._ledger.verify()

    def pin(self, variant: str, version: str | None) -> None:
        """Record the version of a variant that all replicas pin; None follows training."""
        temporary = self._folder / f".{uuid.uuid4().hex}"
        temporary.write_text(json.dumps({"version": version}))
        temporary.replace(self._folder / f"pin-{variant}.json")

    def pinned(self, variant: str) -> str | None:
        """Return the pinned version of a variant, None if it follows training.

        Raises:
            DataError: the file of the pin is damaged.
        """
        path = self._folder / f"pin-{variant}.json"
        try:
            version = json.loads(path.read_text())["version"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"pin {path} is damaged; remove it to follow training, or pin a version again"
            ) from error
        return None if version is None else str(version)
