"""The catalogue as it is served: versions, deltas, rollback, and what each filter leaves of it.

A batch takes one `Shelf` and keeps it. A delta is worked out beside the shelf in use and put in its
place by one assignment, when the engine has turned to its trie.

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
from orchard.catalog.catalog import Catalogue
from orchard.catalog.versioned import LiveCatalogue, Snapshot
from orchard.catalog.view import View
from orchard.data.prompts import PromptFormat
from orchard.errors import CatalogueError, ConfigError, DataError
from orchard.policy.item_tokenizer import Vocabulary
from orchard.settings import FilterConfig
from serve.catalog.attributes import Attributes
from serve.errors import ConflictError, UnknownNameError, UnsuitableError
from serve.schema import DeltaRequest

_VIEWS = 32
"""Combinations of filters whose views are kept per shelf."""


@dataclass(frozen=True, kw_only=True)
class Offer:
    """The items that a combination of filters leaves."""

    items: Bool[np.ndarray, " I"]
    view: View
    per_leaf: Int64[np.ndarray, " K"]
    """Number of items left on each leaf."""
    total: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Shelf:
    """One version of the catalogue with all that answers need. Immutable but for its cache."""

    version: int
    live: LiveCatalogue
    """Changed by nobody once it is here."""
    snapshot: Snapshot
    vocabulary: Vocabulary
    attributes: Attributes
    filters: Mapping[str, FilterConfig]
    popularity: Mapping[int, float]
    _offers: OrderedDict[tuple[str, ...], Offer] = field(
        default_factory=OrderedDict[tuple[str, ...], Offer]
    )
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def catalogue(self) -> Catalogue:
        """Its items, those with a tombstone included."""
        return self.snapshot.catalogue

    @property
    def name(self) -> str:
        """Version and digest, as answers spell it."""
        return f"{self.version}-{self.catalogue.digest[:8]}"

    @cached_property
    def form(self) -> PromptFormat:
        """How histories become tokens."""
        return PromptFormat(catalogue=self.catalogue, vocabulary=self.vocabulary)

    @cached_property
    def by_popularity(self) -> Int64[np.ndarray, " I"]:
        """Rows of the live items, most popular first, then in catalogue order."""
        ids = self.catalogue.item_id
        count = np.zeros(len(ids))
        known = np.fromiter(self.popularity, np.int64, len(self.popularity))
        row, there = self.catalogue.find(known)
        count[row[there]] = np.fromiter(self.popularity.values(), float, len(known))[there]
        order = np.argsort(-count, kind="stable")
        return order[self.snapshot.live[order]]

    def offer(self, names: tuple[str, ...]) -> Offer:
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
                raise UnsuitableError(
                    f"there is no filter {name!r}; known: {', '.join(self.filters) or 'none'}"
                )
            passing = self.attributes.passing(self.catalogue.item_id, self.filters[name])
            items = items & passing
        # Of two views' ancestors an intersection is only a bound: the view is of the items' one.
        view = views.of_items(self.catalogue, items) if key else self.snapshot.view
        leaves = self.catalogue.leaf_of_item[items]
        offer = Offer(
            items=items,
            view=view,
            per_leaf=np.bincount(leaves, minlength=self.catalogue.trie.num_leaves),
            total=int(items.sum()),
        )
        with self._lock:
            self._offers[key] = offer
            while len(self._offers) > _VIEWS:
                self._offers.popitem(last=False)
        return offer

    def plain_sid(self, row: int) -> list[int]:
        """Codes of an item without padding and end marker."""
        codes, ends = self.catalogue.codes[row].tolist(), self.catalogue.end_code
        return [c for c, end in zip(codes, ends, strict=True) if c >= 0 and c != end]


class Stock:
    """Holds the shelf in use and the earlier ones that can be gone back to."""

    def __init__(
        self,
        catalogue: Catalogue,
        vocabulary: Vocabulary,
        *,
        attributes: Attributes,
        filters: Mapping[str, FilterConfig],
        popularity: Mapping[int, float],
        keep: int,
    ) -> None:
        """Start with version 0."""
        live = LiveCatalogue(catalogue)
        self.shelf = Shelf(
            version=0, live=live, snapshot=live.snapshot, vocabulary=vocabulary,
            attributes=attributes, filters=filters, popularity=popularity,
        )  # fmt: skip
        self._keep = keep
        self._earlier: list[Shelf] = []

    @property
    def kept(self) -> list[int]:
        """Versions that can be rolled back to, oldest first."""
        return [shelf.version for shelf in self._earlier]

    def after(self, delta: DeltaRequest) -> Shelf:
        """The shelf that the delta makes of the one in use, which stays there until `put`.

        Raises:
            ConflictError: the delta was made for another version.
            UnknownNameError: the version to go back to is not kept.
            UnsuitableError: the items do not fit the catalogue; the sentence says which and why.
        """
        now = self.shelf
        if delta.base_version is not None and delta.base_version != now.version:
            raise ConflictError(
                f"the delta is for version {delta.base_version}, the catalogue has {now.version}; "
                "look at it again and send the delta anew"
            )
        if delta.rollback_to is not None:
            return replace(self._earlier_one(delta.rollback_to), version=now.version + 1)
        try:
            return _changed(now, delta)
        except (DataError, ConfigError) as error:
            raise UnsuitableError(str(error)) from error

    def put(self, shelf: Shelf) -> None:
        """Use this shelf from now on."""
        assert shelf.version == self.shelf.version + 1
        self._earlier = [*self._earlier, self.shelf][-self._keep :]
        self.shelf = shelf

    def _earlier_one(self, version: int) -> Shelf:
        for shelf in self._earlier:
            if shelf.version == version:
                return shelf
        raise UnknownNameError(
            f"catalogue version {version} is not kept; "
            f"there are {', '.join(map(str, self.kept)) or 'none'}"
        )


def _changed(shelf: Shelf, delta: DeltaRequest) -> Shelf:
    """The next shelf after items are removed, added and changed."""
    _refuse_twins([*delta.remove, *(one.item_id for one in (*delta.add, *delta.update))])
    live, old = shelf.live.fork(), shelf.snapshot
    add: list[tuple[int, Sequence[int], str]] = [
        (one.item_id, one.sid, one.title) for one in delta.add
    ]
    remove = list(delta.remove)
    for one in delta.update:
        row, known = old.catalogue.find(np.array([one.item_id]))
        if not (known[0] and old.live[row[0]]):
            raise DataError(f"item {one.item_id} is to be changed and is not in the catalogue")
        if one.sid is None and one.title is None:
            continue
        at = int(row[0])
        sid = shelf.plain_sid(at) if one.sid is None else one.sid
        title = old.catalogue.title[at] if one.title is None else one.title
        remove.append(one.item_id)
        add.append((one.item_id, sid, title))
    if remove:
        live.remove(remove)
        if not live.snapshot.live.any() and not add:
            raise CatalogueError("the delta removes every item; leave at least one")
    if add:
        live.add([sid for _, sid, _ in add], [i for i, _, _ in add], [t for _, _, t in add])
        live.swap(live.prepare())
    attributes: dict[int, Mapping[str, Any]] = {
        one.item_id: one.attributes for one in (*delta.add, *delta.update)
    }
    return Shelf(
        version=shelf.version + 1,
        live=live,
        snapshot=live.snapshot,
        vocabulary=shelf.vocabulary,
        attributes=shelf.attributes.with_changes(attributes),
        filters=shelf.filters,
        popularity=shelf.popularity,
    )


def _refuse_twins(ids: Sequence[int]) -> None:
    seen: set[int] = set()
    for item in ids:
        if item in seen:
            raise DataError(f"item {item} occurs twice in the delta; say once what is to become")
        seen.add(item)
