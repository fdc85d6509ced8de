"""A search on its way to vLLM's workers: the large things that it refers to travel once.

A search is a function with its arguments. Among them may be views and a catalog, as large as the
number of items, and the same in batch after batch. They are known by their content, not by their
identity: what a worker has been sent before stays there, on its device, and its key alone travels.

Shapes:  R prompts of a part
"""

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64

from orchard.catalog.catalog import Catalog
from orchard.catalog.view import CatalogView
from orchard.types import Prompts
from rollout.candidates import Candidates
from rollout.engine.protocol import DecodingBackend
from rollout.item_filter import ItemFilter

SearchFn = Callable[[DecodingBackend, Prompts], Candidates]

CAPACITY = 16
"""Large things that the workers keep at the most, the ones used last; more in one search travel
with every batch of it."""


@dataclass(frozen=True, kw_only=True)
class SearchPayload:
    """A search, and what its receiver has to take in and to throw away for it."""

    search: bytes
    new: Mapping[str, CatalogView | Catalog]
    gone: tuple[str, ...]


@runtime_checkable
class Splittable(Protocol):
    """A search that knows how to be cut."""

    def part(self, rows: Int64[np.ndarray, " R"]) -> SearchFn:
        """The search for some prompts of its batch."""
        ...


def split_search(find: SearchFn, rows: Int64[np.ndarray, " R"]) -> SearchFn:
    """The search for some prompts of its batch, whose `allowed`, if it has one, is of them all."""
    if isinstance(find, Splittable):
        return find.part(rows)
    allowed = find.keywords.get("allowed") if isinstance(find, partial) else None
    if allowed is None:
        return find
    return partial(find, allowed=cast(ItemFilter, allowed).select(rows))


class PayloadEncoder:
    """Knows what the workers keep, provided that all its parcels arrive, in order."""

    def __init__(self) -> None:
        """Nothing has been sent."""
        self._kept = OrderedDict[str, None]()

    def encode(self, find: SearchFn) -> SearchPayload:
        """The search, with those of its large things that the workers lack."""
        buffer = io.BytesIO()
        pickler = _Pickler(buffer)
        pickler.dump(find)
        new = {key: one for key, one in pickler.met.items() if key not in self._kept}
        for key in pickler.met:
            self._kept[key] = None
            self._kept.move_to_end(key)
        surplus = max(0, len(self._kept) - CAPACITY)
        gone = tuple(self._kept.popitem(last=False)[0] for _ in range(surplus))
        return SearchPayload(search=buffer.getvalue(), new=new, gone=gone)


class PayloadDecoder:
    """Keeps the large things of the parcels that arrive."""

    def __init__(self, device: torch.device) -> None:
        """Views are kept on `device`."""
        self._device = device
        self._kept: dict[str, CatalogView | Catalog] = {}

    def decode(self, parcel: SearchPayload) -> SearchFn:
        """The search as it was packed."""
        for key, one in parcel.new.items():
            self._kept[key] = one.to(self._device) if isinstance(one, CatalogView) else one
        unpickler = _Unpickler(io.BytesIO(parcel.search), self._kept)
        find: SearchFn = unpickler.load()
        for key in parcel.gone:
            del self._kept[key]
        return find


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.met: dict[str, CatalogView | Catalog] = {}

    def persistent_id(self, obj: Any) -> str | None:
        """The key of a large thing; everything else is pickled as it is."""
        if isinstance(obj, CatalogView):
            key = f"view {obj.digest}"
        elif isinstance(obj, Catalog):
            key = f"catalog {obj.digest}"
        else:
            return None
        self.met[key] = obj
        return key


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, kept: Mapping[str, CatalogView | Catalog]) -> None:
        super().__init__(file)
        self._kept = kept

    def persistent_load(self, pid: str) -> CatalogView | Catalog:
        """The large thing of that key."""
        return self._kept[pid]
