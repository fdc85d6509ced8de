"""Versioned catalog that can change while searches use it.

A search takes one snapshot and keeps it: catalog, view and items of a snapshot never change.
Removing an item sets a tombstone, which is visible in the next snapshot. Added items stay in a
delta until a compaction merges them: a code has a probability among its legal siblings, so new
sequences need one new trie instead of an additional one, and the merged trie equals that of a full
rebuild. Merging does not block searches; the commit is one assignment.

Until the commit, removed sequences stay in the policy's distribution, but no search returns them.

Shapes:  I items of the snapshot's catalog   F leaves   F1 = F + 1   M their items   R items
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
from jaxtyping import Bool, Int

from orchard import ragged
from orchard.catalog import catalog as catalogs
from orchard.catalog import codes as tables
from orchard.catalog.catalog import Catalog
from orchard.catalog.view import CatalogView, view_of_items
from orchard.errors import CatalogError, DataError


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Immutable state of the catalog at one version."""

    version: int
    """Number of changes so far; a later snapshot has a larger version."""
    catalog: Catalog
    live: Bool[np.ndarray, " I"]
    """Mask of the items without a tombstone."""
    view: CatalogView
    """View of the leaves that have a live item; every search of the snapshot uses it."""

    def items(
        self, leaf: Int[np.ndarray, " F"]
    ) -> tuple[Int[np.ndarray, " M"], Int[np.ndarray, " F1"]]:
        """Return the rows of the live items of each leaf, ragged, in catalog order."""
        row, start = ragged.take(self.catalog.item_of_leaf, self.catalog.leaf_start, leaf)
        live = self.live[row]
        # `starts` counts the live items before each position, hence before each leaf.
        return row[live], ragged.starts(live.astype(np.int64))[start]


@dataclass(frozen=True, kw_only=True, eq=False)
class PendingItem:
    """Added item that the next compaction will merge."""

    codes: tuple[int, ...]
    title: str


@dataclass(frozen=True, kw_only=True)
class Compaction:
    """Merged catalog that can replace the catalog of its base snapshot."""

    base: Snapshot
    """Snapshot that was merged."""
    delta: Mapping[int, PendingItem]
    """Pending items that were merged, by identifier."""
    merged: Catalog
    """Catalog of the live items and the delta."""


class VersionedCatalog:
    """Current snapshot and delta of a catalog; all methods are thread-safe."""

    def __init__(self, catalog: Catalog) -> None:
        """Start from `catalog`, whose levels and codes define the vocabulary of the policy."""
        self._lock = threading.Lock()
        self._first = catalog
        self._delta: dict[int, PendingItem] = {}
        self._snapshot = _snapshot(0, catalog, np.ones(len(catalog), dtype=np.bool_))

    def copy(self) -> "VersionedCatalog":
        """Return an independent copy of the current state."""
        clone = VersionedCatalog.__new__(VersionedCatalog)
        clone._lock = threading.Lock()
        with self._lock:
            clone._first, clone._delta = self._first, dict(self._delta)
            clone._snapshot = self._snapshot
        return clone

    @property
    def snapshot(self) -> Snapshot:
        """Current snapshot; a search reads it once and keeps it."""
        return self._snapshot

    def add(
        self,
        codes: Sequence[Sequence[int]],
        item_id: Sequence[int],
        title: Sequence[str] | None = None,
    ) -> None:
        """Add items to the delta; searches can return them after the next compaction.

        Raises:
            CatalogError: an identifier is in use, or codes are out of range or of the wrong depth.
        """
        first = self._first
        table, length = tables.pad(codes)
        if first.code_token:
            table, length = tables.append_end(table, length, len(first.code_token) - 1)
        tables.check(table, length, _level_size(first), first.varying_depth)
        titles = title if title is not None else [""] * len(codes)
        additions = {
            identifier: PendingItem(codes=tuple(sid), title=name)
            for identifier, sid, name in zip(item_id, codes, titles, strict=True)
        }
        with self._lock:
            identifiers = np.fromiter(additions, np.int64, len(additions))
            row, in_catalog = self._snapshot.catalog.lookup(identifiers)
            taken = [
                *row[in_catalog & self._snapshot.live[row]],
                *(additions.keys() & self._delta.keys()),
            ]
            if taken or len(additions) < len(item_id):
                num_taken = max(len(taken), len(item_id) - len(additions))
                raise CatalogError(
                    f"{num_taken} of {len(item_id)} items to add "
                    "carry an identifier that is in use; remove the old item first"
                )
            self._delta.update(additions)

    def remove(self, item_id: Sequence[int]) -> None:
        """Set tombstones on items of the catalog and delete pending items from the delta.

        Raises:
            DataError: an item is not in the catalog; no item is removed then.
        """
        requested = set(item_id)
        with self._lock:
            current, pending = self._snapshot, requested & self._delta.keys()
            others = np.fromiter(requested - pending, np.int64, len(requested - pending))
            row, in_catalog = current.catalog.lookup(others)
            removable = in_catalog & current.live[row]
            if not removable.all():
                raise DataError(
                    f"item {others[~removable][0]} is not in the catalog of "
                    f"{int(current.live.sum())} live items ({int((~removable).sum())} such items); "
                    "it may be removed already"
                )
            for identifier in pending:
                del self._delta[identifier]
            if len(row):
                live = current.live.copy()
                live[row] = False
                self._snapshot = _snapshot(current.version + 1, current.catalog, live)

    def compact(self) -> Compaction:
        """Merge the current live items and delta for `commit`; takes as long as a full build.

        Raises:
            CatalogError: no item is left, or the additions need an end marker that the first
                catalog, hence the policy's vocabulary, lacks.
        """
        with self._lock:
            base, delta = self._snapshot, dict(self._delta)
        return Compaction(base=base, delta=delta, merged=_merge(base, delta, self._first))

    def commit(self, compaction: Compaction) -> None:
        """Replace the catalog by the merged one and carry over the changes since `compact`.

        Raises:
            CatalogError: another compaction was committed meanwhile.
        """
        base, merged = compaction.base, compaction.merged
        with self._lock:
            current = self._snapshot
            if current.catalog is not base.catalog:
                raise CatalogError(
                    f"the compaction started from catalog {base.catalog.digest[:12]}, which "
                    f"{current.catalog.digest[:12]} has replaced; compact again"
                )
            # Merged items that are still pending; others were removed or replaced meanwhile.
            merged_in = {i for i, item in compaction.delta.items() if self._delta.get(i) is item}
            removed = np.array(sorted(compaction.delta.keys() - merged_in), dtype=np.int64)
            removed = np.concatenate([base.catalog.item_id[base.live & ~current.live], removed])
            live = np.ones(len(merged), dtype=np.bool_)
            live[merged.rows(removed)] = False
            self._delta = {i: item for i, item in self._delta.items() if i not in merged_in}
            self._snapshot = _snapshot(current.version + 1, merged, live)


def _snapshot(version: int, catalog: Catalog, live: Bool[np.ndarray, " I"]) -> Snapshot:
    """Create a snapshot with the view of its live items."""
    return Snapshot(version=version, catalog=catalog, live=live, view=view_of_items(catalog, live))


def _merge(base: Snapshot, delta: Mapping[int, PendingItem], first: Catalog) -> Catalog:
    """Build the catalog of the live items followed by the delta, with the levels of `first`."""
    old, live_rows = base.catalog, np.flatnonzero(base.live)
    depth = len(old.level_size)
    added_codes = np.full((len(delta), depth), -1, dtype=old.codes.dtype)
    for row, item in enumerate(delta.values()):
        added_codes[row, : len(item.codes)] = item.codes
    merged = catalogs.from_codes(
        np.concatenate([old.plain_codes[live_rows], added_codes]),
        item_id=np.concatenate([old.item_id[live_rows], np.fromiter(delta, np.int64, len(delta))]),
        title=[*compress(old.title, base.live), *(item.title for item in delta.values())],
        level_size=_level_size(first),
        varying_depth=first.varying_depth,
        code_token=first.code_token,
    )
    for level, (size, limit) in enumerate(zip(merged.level_size, first.level_size, strict=True)):
        if size > limit:
            raise CatalogError(
                f"the additions need an end marker at level {level + 1}, of which the policy knows "
                f"{limit} codes; remove the items whose semantic ID begins another one"
            )
    return merged


def _level_size(first: Catalog) -> Sequence[int]:
    """Return the level sizes as `from_codes` expects them: with end markers only in title mode."""
    return first.level_size if first.code_token else first.plain_level_size
