"""The catalog as it is served: versions, deltas, rollback, and what each filter leaves of it.

A batch takes one `Shelf` and keeps it. A delta is worked out beside the catalog version in use and
put in its place by one assignment, when the engine has turned to its trie.

Shapes:  I items   K leaves
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
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
from serve.errors import ConflictError, UnknownNameError, UnprocessableError
from serve.schema import DeltaRequest

_VIEWS = 32
"""Combinations of filters whose views are kept per catalog version."""


@dataclass(frozen=True, kw_only=True)
class FilteredItems:
    """The items that a combination of filters leaves."""

    items: Bool[np.ndarray, " I"]
    view: CatalogView
    per_leaf: Int64[np.ndarray, " K"]
    """Number of items left on each leaf."""
    total: int


@dataclass(frozen=True, kw_only=True, eq=False)
class CatalogVersion:
    """One version of the catalog with all that answers need. Immutable but for its cache."""

    version: int
    live: VersionedCatalog
    """Changed by nobody once it is here."""
    snapshot: Snapshot
    tokenizer: ItemTokenizer
    attributes: Attributes
    filters: Mapping[str, FilterConfig]
    popularity: Mapping[int, float]
    _offers: OrderedDict[tuple[str, ...], FilteredItems] = field(
        default_factory=OrderedDict[tuple[str, ...], FilteredItems]
    )
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def catalog(self) -> Catalog:
        """Its items, those with a tombstone included."""
        return self.snapshot.catalog

    @property
    def name(self) -> str:
        """Version and digest, as answers spell it."""
        return f"{self.version}-{self.catalog.digest[:8]}"

    @cached_property
    def by_popularity(self) -> Int64[np.ndarray, " I"]:
        """Rows of the live items, most popular first, then in catalog order."""
        ids = self.catalog.item_id
        count = np.zeros(len(ids))
        known = np.fromiter(self.popularity, np.int64, len(self.popularity))
        row, there = self.catalog.find(known)
        count[row[there]] = np.fromiter(self.popularity.values(), float, len(known))[there]
        order = np.argsort(-count, kind="stable")
        return order[self.snapshot.live[order]]

    def offer(self, names: tuple[str, ...]) -> FilteredItems:
        """What the named filters leave; all that is live where there are none.

        Raises:
            UnsuitableError: there is no such filter.
        """
        key = tuple(sorted(set(names)))
        with self._lock:
            if key in self._offers:
                self._offers.move_to_end(key)
                return self._offers[key]
        items = self.snapshot.live
        for name in key:
            if name not in self.filters:
                raise UnprocessableError(
                    f"there is no filter {name!r}; known: {', '.join(self.filters) or 'none'}"
                )
            passing = self.attributes.passing(self.catalog.item_id, self.filters[name])
            items = items & passing
        # Of two views' ancestors an intersection is only a bound: the view is of the items' one.
        view = views.view_of_items(self.catalog, items) if key else self.snapshot.view
        leaves = self.catalog.leaf_of_item[items]
        offer = FilteredItems(
            items=items,
            view=view,
            per_leaf=np.bincount(leaves, minlength=self.catalog.trie.num_leaves),
            total=int(items.sum()),
        )
        with self._lock:
            self._offers[key] = offer
            while len(self._offers) > _VIEWS:
                self._offers.popitem(last=False)
        return offer

    def plain_sid(self, row: int) -> list[int]:
        """Codes of an item without padding and end marker."""
        codes, ends = self.catalog.codes[row].tolist(), self.catalog.end_code
        return [c for c, end in zip(codes, ends, strict=True) if c >= 0 and c != end]


class CatalogStore:
    """Holds the catalog version in use and the earlier ones that can be gone back to."""

    def __init__(
        self,
        tokenizer: ItemTokenizer,
        *,
        attributes: Attributes,
        filters: Mapping[str, FilterConfig],
        popularity: Mapping[int, float],
        keep: int,
    ) -> None:
        """Start with version 0."""
        live = VersionedCatalog(tokenizer.catalog)
        self.current = CatalogVersion(
            version=0, live=live, snapshot=live.snapshot, tokenizer=tokenizer,
            attributes=attributes, filters=filters, popularity=popularity,
        )  # fmt: skip
        self._keep = keep
        self._earlier: list[CatalogVersion] = []

    @property
    def kept(self) -> list[int]:
        """Versions that can be rolled back to, oldest first."""
        return [catalog_version.version for catalog_version in self._earlier]

    def apply(self, delta: DeltaRequest) -> CatalogVersion:
        """Apply a delta to the current catalog version, which stays in use until `activate`.

        Raises:
            ConflictError: the delta was made for another version.
            UnknownNameError: the version to go back to is not kept.
            UnsuitableError: the items do not fit the catalog; the sentence says which and why.
        """
        now = self.current
        if delta.base_version is not None and delta.base_version != now.version:
            raise ConflictError(
                f"the delta is for version {delta.base_version}, the catalog has {now.version}; "
                "look at it again and send the delta anew"
            )
        if delta.rollback_to is not None:
            return replace(self._earlier_one(delta.rollback_to), version=now.version + 1)
        try:
            return _changed(now, delta)
        except (DataError, ConfigError) as error:
            raise UnprocessableError(str(error)) from error

    def activate(self, catalog_version: CatalogVersion) -> None:
        """Use this catalog version from now on."""
        assert catalog_version.version == self.current.version + 1
        self._earlier = [*self._earlier, self.current][-self._keep :]
        self.current = catalog_version

    def _earlier_one(self, version: int) -> CatalogVersion:
        for catalog_version in self._earlier:
            if catalog_version.version == version:
                return catalog_version
        raise UnknownNameError(
            f"catalog version {version} is not kept; "
            f"there are {', '.join(map(str, self.kept)) or 'none'}"
        )


def _changed(catalog_version: CatalogVersion, delta: DeltaRequest) -> CatalogVersion:
    """The next catalog version after items are removed, added and changed."""
    _refuse_twins([*delta.remove, *(one.item_id for one in (*delta.add, *delta.update))])
    live, old = catalog_version.live.copy(), catalog_version.snapshot
    add: list[tuple[int, Sequence[int], str]] = [
        (one.item_id, one.sid, one.title) for one in delta.add
    ]
    remove = list(delta.remove)
    for one in delta.update:
        row, known = old.catalog.find(np.array([one.item_id]))
        if not (known[0] and old.live[row[0]]):
            raise DataError(f"item {one.item_id} is to be changed and is not in the catalog")
        if one.sid is None and one.title is None:
            continue
        at = int(row[0])
        sid = catalog_version.plain_sid(at) if one.sid is None else one.sid
        title = old.catalog.title[at] if one.title is None else one.title
        remove.append(one.item_id)
        add.append((one.item_id, sid, title))
    if remove:
        live.remove(remove)
        if not live.snapshot.live.any() and not add:
            raise CatalogError("the delta removes every item; leave at least one")
    if add:
        live.add([sid for _, sid, _ in add], [i for i, _, _ in add], [t for _, _, t in add])
        live.swap(live.build())
    attributes: dict[int, Mapping[str, Any]] = {
        one.item_id: one.attributes for one in (*delta.add, *delta.update)
    }
    return CatalogVersion(
        version=catalog_version.version + 1,
        live=live,
        snapshot=live.snapshot,
        tokenizer=catalog_version.tokenizer.with_catalog(live.snapshot.catalog),
        attributes=catalog_version.attributes.with_changes(attributes),
        filters=catalog_version.filters,
        popularity=catalog_version.popularity,
    )


def _refuse_twins(ids: Sequence[int]) -> None:
    seen: set[int] = set()
    for item in ids:
        if item in seen:
            raise DataError(f"item {item} occurs twice in the delta; say once what is to become")
        seen.add(item)
