"""Served catalog: versions, deltas, rollback and filtered views.

A batch uses one `CatalogVersion` throughout. A delta builds a new version while the current one
stays in use; one assignment then makes the new version current.

Shapes:  I items   K leaves
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from orchard.catalog import view as views
from orchard.catalog.catalog import Catalog
from orchard.catalog.versioned import Snapshot, VersionedCatalog
from orchard.catalog.view import CatalogView
from orchard.errors import CatalogError, ConfigError, DataError
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.settings import FilterConfig
from serve.catalog.attributes import Attributes
from serve.catalog.new_items import Assigner
from serve.catalog.schema import AssignedItem, DeltaRequest
from serve.errors import ConflictError, UnknownNameError, UnprocessableError

_VIEWS = 32
"""Maximum number of filter combinations cached per catalog version."""


@dataclass(frozen=True, kw_only=True)
class FilteredItems:
    """Items that pass a combination of filters."""

    items: Bool[np.ndarray, " I"]
    view: CatalogView
    per_leaf: Int64[np.ndarray, " K"]
    """Number of passing items on each leaf."""
    total: int


@dataclass(frozen=True, kw_only=True, eq=False)
class CatalogVersion:
    """One version of the catalog with its tokenizer and filters. Immutable except for a cache."""

    version: int
    live: VersionedCatalog
    """Versioned catalog of this version; never modified."""
    snapshot: Snapshot
    tokenizer: ItemTokenizer
    attributes: Attributes
    filters: Mapping[str, FilterConfig]
    popularity: Mapping[int, float]
    retired: Mapping[int, tuple[int, ...]] = field(default_factory=dict[int, tuple[int, ...]])
    """Semantic IDs of the items that were removed and are not there again, by identifier."""
    _filtered: OrderedDict[tuple[str, ...], FilteredItems] = field(
        default_factory=OrderedDict[tuple[str, ...], FilteredItems]
    )
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def catalog(self) -> Catalog:
        """Catalog of this version, including removed items."""
        return self.snapshot.catalog

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the catalog and of what was removed from it; the catalog's own without."""
        live = self.snapshot.live
        if live.all():
            return self.catalog.digest
        sha256 = hashlib.sha256(self.catalog.digest.encode())
        sha256.update(np.packbits(live).tobytes())
        return sha256.hexdigest()

    @property
    def name(self) -> str:
        """Version number and digest, as shown in responses."""
        return f"{self.version}-{self.digest[:8]}"

    @property
    def is_whole(self) -> bool:
        """Whether no item of the catalog is removed."""
        return bool(self.snapshot.live.all())

    @cached_property
    def by_popularity(self) -> Int64[np.ndarray, " I"]:
        """Catalog rows of the live items, most popular first, ties in catalog order."""
        ids = self.catalog.item_id
        count = np.zeros(len(ids))
        counted_ids = np.fromiter(self.popularity, np.int64, len(self.popularity))
        rows, in_catalog = self.catalog.lookup(counted_ids)
        counts = np.fromiter(self.popularity.values(), float, len(counted_ids))
        # Popularity of each catalog row, 0 if it was not counted.
        count[rows[in_catalog]] = counts[in_catalog]
        order = np.argsort(-count, kind="stable")
        return order[self.snapshot.live[order]]

    def filtered_items(self, names: tuple[str, ...]) -> FilteredItems:
        """Return the live items that pass all named filters; all live items without filters.

        Raises:
            UnprocessableError: a filter does not exist.
        """
        key = tuple(sorted(set(names)))
        with self._lock:
            if key in self._filtered:
                self._filtered.move_to_end(key)
                return self._filtered[key]
        items = self.snapshot.live
        for name in key:
            if name not in self.filters:
                raise UnprocessableError(
                    f"there is no filter {name!r}; known: {', '.join(self.filters) or 'none'}"
                )
            passing = self.attributes.passing(self.catalog.item_id, self.filters[name])
            items = items & passing
        # Built from the items: intersecting the filters' views would keep prefixes without items.
        view = views.view_of_items(self.catalog, items) if key else self.snapshot.view
        leaves = self.catalog.leaf_of_item[items]
        filtered = FilteredItems(
            items=items,
            view=view,
            per_leaf=np.bincount(leaves, minlength=self.catalog.trie.num_leaves),
            total=int(items.sum()),
        )
        with self._lock:
            self._filtered[key] = filtered
            while len(self._filtered) > _VIEWS:
                self._filtered.popitem(last=False)
        return filtered

    def plain_sid(self, row: int) -> list[int]:
        """Return the codes of the item at a catalog row without padding and end code."""
        codes, end_codes = self.catalog.codes[row].tolist(), self.catalog.end_code
        return [c for c, end in zip(codes, end_codes, strict=True) if c >= 0 and c != end]


class CatalogStore:
    """Current catalog version and the earlier versions available for rollback."""

    def __init__(
        self,
        tokenizer: ItemTokenizer,
        *,
        attributes: Attributes,
        filters: Mapping[str, FilterConfig],
        popularity: Mapping[int, float],
        keep: int,
        assigner: Assigner | None = None,
    ) -> None:
        """Start with version 0; `assigner` gives semantic IDs to new items without any."""
        self.assigner = assigner or Assigner(bundle=None)
        live = VersionedCatalog(tokenizer.catalog)
        self.current = CatalogVersion(
            version=0, live=live, snapshot=live.snapshot, tokenizer=tokenizer,
            attributes=attributes, filters=filters, popularity=popularity,
        )  # fmt: skip
        self._first = self.current
        self._keep = keep
        self._earlier: list[CatalogVersion] = []

    @property
    def kept(self) -> list[int]:
        """Versions available for rollback, oldest first."""
        return [catalog_version.version for catalog_version in self._earlier]

    def apply(self, delta: DeltaRequest) -> CatalogVersion:
        """Build the next version from a delta; the current one stays in use until `activate`.

        Raises:
            ConflictError: the delta was made for another version.
            UnknownNameError: the version to roll back to is not kept.
            UnprocessableError: the items do not fit the catalog; the message names them and why.
        """
        current = self.current
        self._check_base(delta)
        if delta.rollback_to is not None:
            return replace(self._earlier_version(delta.rollback_to), version=current.version + 1)
        try:
            return _apply_changes(current, delta, strict=True)
        except (DataError, ConfigError) as error:
            raise UnprocessableError(str(error)) from error

    def with_sids(self, delta: DeltaRequest) -> tuple[DeltaRequest, list[AssignedItem]]:
        """Return a delta whose new items all have semantic IDs, and those that were assigned.

        Raises:
            ConflictError: the delta was made for another version.
            UnprocessableError: an ID cannot be assigned (see `Assigner.assign`).
        """
        self._check_base(delta)
        live = np.flatnonzero(self.current.snapshot.live)
        return self.assigner.assign(delta, self.current.catalog, live, self.current.retired)

    def _check_base(self, delta: DeltaRequest) -> None:
        """Raise ConflictError if a delta was made for another version than the current one."""
        if delta.base_version is not None and delta.base_version != self.current.version:
            raise ConflictError(
                f"the delta is for version {delta.base_version}, the catalog has "
                f"{self.current.version}; read the catalog again and send a new delta"
            )

    def replay(
        self, delta: DeltaRequest, changes_of: Callable[[int], Sequence[DeltaRequest]]
    ) -> CatalogVersion:
        """Build the next version from a delta that was accepted before.

        The settings may have changed since then: attributes that no column takes any more are
        passed over, and a version that is no longer kept for rollback is built again.

        Args:
            delta: the delta; its `base_version` is not looked at.
            changes_of: the changes that lead from version 0 to an earlier version.

        Raises:
            DataError: the delta does not fit the catalog.
        """
        if delta.rollback_to is None:
            return _apply_changes(self.current, delta, strict=False)
        for kept in self._earlier:
            if kept.version == delta.rollback_to:
                return replace(kept, version=self.current.version + 1)
        rebuilt = self._first
        for change in changes_of(delta.rollback_to):
            rebuilt = _apply_changes(rebuilt, change, strict=False)
        return replace(rebuilt, version=self.current.version + 1)

    def activate(self, catalog_version: CatalogVersion) -> None:
        """Make a catalog version built by `apply` the current one."""
        assert catalog_version.version == self.current.version + 1
        self._earlier = [*self._earlier, self.current][-self._keep :]
        self.current = catalog_version

    def _earlier_version(self, version: int) -> CatalogVersion:
        """Return an earlier version; raise UnknownNameError if it is not kept."""
        for catalog_version in self._earlier:
            if catalog_version.version == version:
                return catalog_version
        raise UnknownNameError(
            f"catalog version {version} is not kept; "
            f"there are {', '.join(map(str, self.kept)) or 'none'}"
        )


def _apply_changes(
    catalog_version: CatalogVersion, delta: DeltaRequest, *, strict: bool
) -> CatalogVersion:
    """Return the next catalog version, with items removed, added and updated.

    Attributes that fit no column raise ConfigError if `strict`, and are passed over otherwise.
    """
    _refuse_duplicates([*delta.remove, *(item.item_id for item in (*delta.add, *delta.update))])
    live, old = catalog_version.live.copy(), catalog_version.snapshot
    add: list[tuple[int, Sequence[int], str]] = []
    for item in delta.add:
        if item.sid is None:
            raise DataError(f"item {item.item_id} has no sid; send one to add it")
        add.append((item.item_id, item.sid, item.title))
    remove, added = list(delta.remove), {item.item_id for item in delta.add}
    # An update of codes or title removes the item and adds it again.
    for item in delta.update:
        rows, in_catalog = old.catalog.lookup(np.array([item.item_id]))
        if not (in_catalog[0] and old.live[rows[0]]):
            raise DataError(f"item {item.item_id} is not in the catalog and cannot be changed")
        if item.sid is None and item.title is None:
            continue
        row = int(rows[0])
        sid = catalog_version.plain_sid(row) if item.sid is None else item.sid
        title = old.catalog.title[row] if item.title is None else item.title
        remove.append(item.item_id)
        add.append((item.item_id, sid, title))
    if remove:
        live.remove(remove)
        if not live.snapshot.live.any() and not add:
            raise CatalogError("the delta removes every item; leave at least one")
    retired = {item: sid for item, sid in catalog_version.retired.items() if item not in added}
    if delta.remove:
        gone, _ = old.catalog.lookup(np.array(delta.remove, dtype=np.int64))
        for item_id, row in zip(delta.remove, gone.tolist(), strict=True):
            retired[item_id] = tuple(catalog_version.plain_sid(row))
    if add:
        live.add([sid for _, sid, _ in add], [i for i, _, _ in add], [t for _, _, t in add])
        live.commit(live.compact())
    attributes: dict[int, Mapping[str, Any]] = {
        item.item_id: item.attributes for item in (*delta.add, *delta.update)
    }
    return CatalogVersion(
        version=catalog_version.version + 1,
        live=live,
        snapshot=live.snapshot,
        tokenizer=catalog_version.tokenizer.with_catalog(live.snapshot.catalog),
        attributes=catalog_version.attributes.with_changes(attributes, strict=strict),
        filters=catalog_version.filters,
        popularity=catalog_version.popularity,
        retired=retired,
    )


def _refuse_duplicates(ids: Sequence[int]) -> None:
    """Raise DataError if an item id occurs more than once."""
    seen: set[int] = set()
    for item_id in ids:
        if item_id in seen:
            raise DataError(f"item {item_id} occurs twice in the delta; list each item once")
        seen.add(item_id)
