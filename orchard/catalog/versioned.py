"""A catalog that changes while it is searched.

A search takes one snapshot and keeps it: catalog, view and items of a snapshot never change.
Removing an item puts a tombstone on it, which is visible in the next snapshot. Added items wait in
a delta until a compaction merges them: a code has a probability among its legal siblings, so new
sequences need a new trie, not a second one beside it, and the merged trie is the one that a rebuild
would give. Building it disturbs nobody; the swap is one assignment.

Until then removed sequences stay in the policy's distribution, though none is ever found.

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
    """A catalog at one moment."""

    version: int
    """Counts the changes; of two snapshots the later has the larger one."""
    catalog: Catalog
    live: Bool[np.ndarray, " I"]
    """False for items with a tombstone."""
    view: CatalogView
    """The leaves that still have an item; every search of the snapshot takes it."""

    def items(
        self, leaf: Int[np.ndarray, " F"]
    ) -> tuple[Int[np.ndarray, " M"], Int[np.ndarray, " F1"]]:
        """Rows of the live items of each leaf, ragged, in catalog order."""
        row, start = ragged.take(self.catalog.item_of_leaf, self.catalog.leaf_start, leaf)
        live = self.live[row]
        return row[live], ragged.starts(live.astype(np.int64))[start]


@dataclass(frozen=True, kw_only=True, eq=False)
class PendingItem:
    """An item that waits for the next compaction."""

    codes: tuple[int, ...]
    title: str


@dataclass(frozen=True, kw_only=True)
class Compaction:
    """A catalog that may take the place of the one it was made from."""

    base: Snapshot
    delta: Mapping[int, PendingItem]
    merged: Catalog


class VersionedCatalog:
    """Holds the current snapshot and the delta. Its methods may be called from any thread."""

    def __init__(self, catalog: Catalog) -> None:
        """Start from `catalog`, whose levels and codes are all that its policy knows."""
        self._lock = threading.Lock()
        self._first = catalog
        self._delta: dict[int, PendingItem] = {}
        self._snapshot = _snapshot(0, catalog, np.ones(len(catalog), dtype=np.bool_))

    def copy(self) -> "VersionedCatalog":
        """Another one that begins as this one is now; neither sees later changes of the other."""
        twin = VersionedCatalog.__new__(VersionedCatalog)
        twin._lock = threading.Lock()
        with self._lock:
            twin._first, twin._delta = self._first, dict(self._delta)
            twin._snapshot = self._snapshot
        return twin

    @property
    def snapshot(self) -> Snapshot:
        """What is there now. A search takes it once."""
        return self._snapshot

    @property
    def num_waiting(self) -> int:
        """Items of the delta."""
        return len(self._delta)

    def add(
        self,
        codes: Sequence[Sequence[int]],
        item_id: Sequence[int],
        title: Sequence[str] | None = None,
    ) -> None:
        """Put items into the delta; the next compaction makes them findable.

        Raises:
            CatalogError: an identifier is in use, or codes are out of range or of wrong depth.
        """
        first = self._first
        table, length = tables.pad(codes)
        if first.code_token:
            table, length = tables.append_end(table, length, len(first.code_token) - 1)
        tables.check(table, length, _level_size(first), first.varying_depth)
        titles = title if title is not None else [""] * len(codes)
        new = {
            identifier: PendingItem(codes=tuple(sid), title=name)
            for identifier, sid, name in zip(item_id, codes, titles, strict=True)
        }
        with self._lock:
            row, known = self._snapshot.catalog.find(np.fromiter(new, np.int64, len(new)))
            taken = [*row[known & self._snapshot.live[row]], *(new.keys() & self._delta.keys())]
            if taken or len(new) < len(item_id):
                raise CatalogError(
                    f"{max(len(taken), len(item_id) - len(new))} of {len(item_id)} items to add "
                    "carry an identifier that is in use; remove the old item first"
                )
            self._delta.update(new)

    def remove(self, item_id: Sequence[int]) -> None:
        """Put tombstones on items, and take those that still wait out of the delta.

        Raises:
            DataError: an item is not there; nothing is removed then.
        """
        asked = set(item_id)
        with self._lock:
            now, waiting = self._snapshot, asked & self._delta.keys()
            found = np.fromiter(asked - waiting, np.int64, len(asked - waiting))
            row, known = now.catalog.find(found)
            there = known & now.live[row]
            if not there.all():
                raise DataError(
                    f"item {found[~there][0]} is not in the catalog of {int(now.live.sum())} "
                    f"live items ({int((~there).sum())} such items); it may be removed already"
                )
            for identifier in waiting:
                del self._delta[identifier]
            if len(row):
                live = now.live.copy()
                live[row] = False
                self._snapshot = _snapshot(now.version + 1, now.catalog, live)

    def build(self) -> Compaction:
        """Merge the live items and the delta as they are now, for `swap`; takes as long as a build.

        Raises:
            CatalogError: no item is left, or the additions need an end marker that the first
                catalog, hence the policy's vocabulary, does not have.
        """
        with self._lock:
            base, delta = self._snapshot, dict(self._delta)
        return Compaction(base=base, delta=delta, merged=_merge(base, delta, self._first))

    def swap(self, compaction: Compaction) -> None:
        """Put the merged catalog in place; what changed since `prepare` is carried over.

        Raises:
            CatalogError: another compaction was swapped in since.
        """
        base, merged = compaction.base, compaction.merged
        with self._lock:
            now = self._snapshot
            if now.catalog is not base.catalog:
                raise CatalogError(
                    f"the compaction started from catalog {base.catalog.digest[:12]}, which "
                    f"{now.catalog.digest[:12]} has replaced; prepare another one"
                )
            merged_in = {i for i, one in compaction.delta.items() if self._delta.get(i) is one}
            gone = np.array(sorted(compaction.delta.keys() - merged_in), dtype=np.int64)
            gone = np.concatenate([base.catalog.item_id[base.live & ~now.live], gone])
            live = np.ones(len(merged), dtype=np.bool_)
            live[merged.rows(gone)] = False
            self._delta = {i: one for i, one in self._delta.items() if i not in merged_in}
            self._snapshot = _snapshot(now.version + 1, merged, live)


def _snapshot(version: int, catalog: Catalog, live: Bool[np.ndarray, " I"]) -> Snapshot:
    return Snapshot(version=version, catalog=catalog, live=live, view=view_of_items(catalog, live))


def _merge(base: Snapshot, delta: Mapping[int, PendingItem], first: Catalog) -> Catalog:
    """The catalog of the live items and, behind them, the delta, with the levels of `first`."""
    old, kept = base.catalog, np.flatnonzero(base.live)
    depth = len(old.level_size)
    new = np.full((len(delta), depth), -1, dtype=old.codes.dtype)
    for row, addition in enumerate(delta.values()):
        new[row, : len(addition.codes)] = addition.codes
    merged = catalogs.from_codes(
        np.concatenate([old.plain_codes[kept], new]),
        item_id=np.concatenate([old.item_id[kept], np.fromiter(delta, np.int64, len(delta))]),
        title=[*compress(old.title, base.live), *(one.title for one in delta.values())],
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
    """As `from_codes` takes it: only titles have their end counted among the codes."""
    return first.level_size if first.code_token else first.plain_level_size
