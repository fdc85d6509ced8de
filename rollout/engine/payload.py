"""Serialize searches for vLLM's workers; large arguments are sent once and cached by digest.

A search is a function with its arguments. These may include catalog views, a catalog and a guide,
whose size grows with the number of items and which are the same in batch after batch. They are
identified by their content: a worker caches what it has received, on its device, and later payloads
contain only the key.

Shapes:  R selected prompts
"""

import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Int64

from orchard.catalog.catalog import Catalog
from orchard.catalog.view import CatalogView
from orchard.guide.guide import Guide
from rollout.engine.protocol import SearchFn
from rollout.item_filter import ItemFilter

LargeArgument = CatalogView | Catalog | Guide
"""Argument that workers cache by its content."""

CAPACITY = 16
"""Maximum number of large arguments that workers cache, by last use; a search with more of them
sends the surplus with every batch."""


@dataclass(frozen=True, kw_only=True)
class SearchPayload:
    """Serialized search, with the changes to the receiver's cache of large arguments."""

    search: bytes
    """Pickled search, with large arguments replaced by their keys."""
    new: Mapping[str, LargeArgument]
    """Arguments to add to the cache before unpickling, by key."""
    gone: tuple[str, ...]
    """Keys to evict from the cache after unpickling."""


def split_search(search_fn: SearchFn, rows: Int64[np.ndarray, " R"]) -> SearchFn:
    """Return the search for the prompts `rows` of its batch, with its item filter split alike."""
    allowed = search_fn.keywords.get("allowed") if isinstance(search_fn, partial) else None
    if allowed is None:
        return search_fn
    return partial(search_fn, allowed=cast(ItemFilter, allowed).select(rows))


class PayloadEncoder:
    """Encoder of searches that tracks the workers' caches.

    All its payloads must arrive, in order.
    """

    def __init__(self) -> None:
        """Start with empty caches."""
        self._cached = OrderedDict[str, None]()

    def encode(self, search_fn: SearchFn) -> SearchPayload:
        """Encode a search, with the large arguments that the workers have not cached."""
        buffer = io.BytesIO()
        pickler = _Pickler(buffer)
        pickler.dump(search_fn)
        new = {key: value for key, value in pickler.large.items() if key not in self._cached}
        for key in pickler.large:
            self._cached[key] = None
            self._cached.move_to_end(key)
        surplus = max(0, len(self._cached) - CAPACITY)
        gone = tuple(self._cached.popitem(last=False)[0] for _ in range(surplus))
        return SearchPayload(search=buffer.getvalue(), new=new, gone=gone)


class PayloadDecoder:
    """Decoder of payloads that caches their large arguments."""

    def __init__(self, device: torch.device) -> None:
        """Start with an empty cache, whose views are stored on `device`."""
        self._device = device
        self._cached: dict[str, LargeArgument] = {}

    def decode(self, payload: SearchPayload) -> SearchFn:
        """Decode a search and update the cache."""
        for key, value in payload.new.items():
            self._cached[key] = value.to(self._device) if isinstance(value, CatalogView) else value
        unpickler = _Unpickler(io.BytesIO(payload.search), self._cached)
        search_fn: SearchFn = unpickler.load()
        for key in payload.gone:
            del self._cached[key]
        return search_fn


class _Pickler(pickle.Pickler):
    """Pickler that replaces large arguments by keys and collects them in `large`."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.large: dict[str, LargeArgument] = {}

    def persistent_id(self, obj: Any) -> str | None:
        """Return the key of a large argument; None pickles everything else by value."""
        if isinstance(obj, CatalogView):
            key = f"view {obj.digest}"
        elif isinstance(obj, Catalog):
            key = f"catalog {obj.digest}"
        elif isinstance(obj, Guide):
            key = f"guide {obj.digest}"
        else:
            return None
        self.large[key] = obj
        return key


class _Unpickler(pickle.Unpickler):
    """Unpickler that looks large arguments up in a cache."""

    def __init__(self, file: io.BytesIO, cached: Mapping[str, LargeArgument]) -> None:
        super().__init__(file)
        self._cached = cached

    def persistent_load(self, pid: str) -> LargeArgument:
        """Return the large argument with the key `pid`."""
        return self._cached[pid]
