"""Assign semantic IDs of the policy's tokenizer bundle to the items of a delta that have none.

The delta with these IDs is what is written to the ledger: replicas and restarts see ordinary ones.

Shapes:  N new items   E dimensions of an embedding   R rows of the catalog   L levels of the
         quantizer   M levels of the semantic IDs
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64

from orchard.catalog.catalog import Catalog
from orchard.semantic_ids import assign, embed
from orchard.semantic_ids.bundle import Bundle
from orchard.semantic_ids.neighbors import nearest_items
from serve.catalog.schema import AssignedItem, DeltaRequest, Neighbor, NewItem
from serve.errors import UnprocessableError

_NEIGHBORS = 5
"""Number of neighbors that an answer lists for each new item."""
_MOST_WITH_NEIGHBORS = 100
"""Number of new items in a delta up to which their neighbors are searched."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Assigner:
    """Assigner of semantic IDs to new items of a catalog."""

    bundle: Bundle | None
    """Tokenizer bundle of the policy."""
    refused: str = ""
    """Reason why there is no bundle, without paths."""

    @property
    def digest(self) -> str:
        """Digest of the bundle, empty without one."""
        return "" if self.bundle is None else self.bundle.digest

    def assign(
        self,
        delta: DeltaRequest,
        catalog: Catalog,
        live: Int64[np.ndarray, " R"],
        retired: Mapping[int, Sequence[int]],
    ) -> tuple[DeltaRequest, list[AssignedItem]]:
        """Give every item that a delta adds a semantic ID; return that delta, and what was given.

        An item that had an ID before, in the bundle or in the catalog, gets it again. Others take
        the nearest codes that are free, beside all items that are or were there.

        Args:
            delta: the delta, which is not changed.
            catalog: the catalog before it.
            live: rows of the items that are not removed.
            retired: semantic IDs of items that were removed, by identifier.

        Raises:
            UnprocessableError: the bundle cannot make the ID of an item.
        """
        items = [item for item in delta.add if item.sid is None]
        if not items:
            return delta, []
        kept = self._kept([item.item_id for item in items], retired)
        found = {
            item: AssignedItem(
                item_id=item, sid=list(sid), source="kept", moved=False, shared=False,
                distance=None, typical_distance=self._typical_distance(), neighbors=[],
            )
            for item, sid in kept.items()
        }  # fmt: skip
        fresh = [item for item in items if item.item_id not in kept]
        if fresh:
            made = self._made(fresh, delta, catalog, live, retired)
            found |= {item.item_id: item for item in made}
        add = [
            item if item.sid is not None
            else item.model_copy(update={"sid": found[item.item_id].sid, "embedding": None})
            for item in delta.add
        ]  # fmt: skip
        changed = delta.model_copy(update={"add": add, "share_when_full": False})
        return changed, [found[item.item_id] for item in items]

    def _kept(
        self, item_id: Sequence[int], retired: Mapping[int, Sequence[int]]
    ) -> dict[int, Sequence[int]]:
        """Return the semantic IDs that items had before."""
        kept: dict[int, Sequence[int]] = {}
        if self.bundle is not None:
            row, is_known = self.bundle.table.lookup(np.array(item_id, dtype=np.int64))
            for item, place, known in zip(item_id, row, is_known, strict=True):
                if known:
                    kept[item] = self.bundle.table.sid[place].tolist()
        return kept | {item: retired[item] for item in item_id if item in retired}

    def _typical_distance(self) -> float | None:
        """Return the root mean square distance of the first items to what their IDs stand for."""
        if self.bundle is None:
            return None
        table = self.bundle.table
        return float(np.sqrt(table.distance[table.version == 1].mean(dtype=np.float64)))

    def _made(
        self,
        items: Sequence[NewItem],
        delta: DeltaRequest,
        catalog: Catalog,
        live: Int64[np.ndarray, " R"],
        retired: Mapping[int, Sequence[int]],
    ) -> list[AssignedItem]:
        """Assign new semantic IDs to items."""
        vectors = self._vectors(items)
        assert self.bundle is not None
        bundle, sizes = self.bundle, catalog.plain_level_size
        codes = catalog.plain_codes.astype(np.int64)
        width = bundle.table.sid.shape[1]
        # Items with explicit semantic IDs in the same delta and in the past are in the way, too.
        explicit = [item.sid for item in (*delta.add, *delta.update) if item.sid is not None]
        others = [sid for sid in (*explicit, *retired.values()) if len(sid) == width]
        further = np.array(others, dtype=np.int64).reshape(-1, width)
        taken = np.concatenate([codes[(codes >= 0).all(axis=1)], further])
        ids = np.array([item.item_id for item in items], dtype=np.int64)
        made = assign.assign(
            bundle, ids, vectors, taken=taken, level_size=sizes, share_when_full=True
        )
        if made.is_shared.any() and not delta.share_when_full:
            row = int(np.argmax(made.is_shared))
            prefix = ", ".join(map(str, made.items.sid[row, :-1]))
            raise UnprocessableError(
                f"all {sizes[-1]} codes of the last level are taken below ({prefix}), where item "
                f"{ids[row]} belongs ({int(made.is_shared.sum())} of {len(ids)} items find none); "
                "leave these items out, or send share_when_full"
            )
        near: list[list[Neighbor]] = [[] for _ in items]
        if len(items) <= _MOST_WITH_NEIGHBORS:
            near = _neighbors(bundle, vectors, catalog.item_id[live], codes[live])
        distance = np.sqrt(made.items.distance.astype(np.float64))
        typical = self._typical_distance()
        return [
            AssignedItem(
                item_id=int(ids[row]), sid=made.items.sid[row].tolist(), source="bundle",
                moved=bool(made.is_moved[row]), shared=bool(made.is_shared[row]),
                distance=float(distance[row]), typical_distance=typical, neighbors=near[row],
            )
            for row in range(len(items))
        ]  # fmt: skip

    def _vectors(self, items: Sequence[NewItem]) -> Float32[np.ndarray, "N E"]:
        """Embed items as the bundle does; raise UnprocessableError where it cannot."""
        first = items[0].item_id
        if self.bundle is None:
            why = self.refused or "the policy carries no tokenizer bundle"
            raise UnprocessableError(
                f"item {first} has no sid, and {why}; send its sid, or serve a policy that was "
                "trained on data with their bundle"
            )
        described, encoder = self.bundle.description, self.bundle.titles
        if encoder is not None:
            for item in items:
                if item.embedding is not None:
                    raise UnprocessableError(
                        f"item {item.item_id} has an embedding, but the tokenizer bundle embeds "
                        "titles itself; send its title instead"
                    )
                if not item.title.strip():
                    raise UnprocessableError(
                        f"item {item.item_id} has neither sid nor title, from which the tokenizer "
                        "bundle makes one; send either"
                    )
            vectors = encoder.embed([item.title for item in items])
            what = "no word of the title of item {} is in the vocabulary of the tokenizer bundle"
        else:
            vectors = _given(items, described.dimensions, described.origin)
            what = "the embedding of item {} is zero, or too short beside others to say anything"
        is_silent = embed.lengths(vectors) <= described.least_length
        if is_silent.any():
            about = what.format(items[int(np.argmax(is_silent))].item_id)
            raise UnprocessableError(
                f"{about} ({int(is_silent.sum())} of {len(items)} such items), so that its "
                "semantic ID would be arbitrary; send another, or its sid"
            )
        return vectors


def _given(items: Sequence[NewItem], dimensions: int, origin: str) -> Float32[np.ndarray, "N E"]:
    """Return the embeddings that items come with."""
    for item in items:
        if item.embedding is None:
            raise UnprocessableError(
                f"item {item.item_id} has neither sid nor embedding, and the tokenizer bundle "
                f"cannot embed it by itself (it was made from {origin}); send either"
            )
        if len(item.embedding) != dimensions:
            raise UnprocessableError(
                f"the embedding of item {item.item_id} has {len(item.embedding)} dimensions, those "
                f"of the tokenizer bundle have {dimensions} ({origin}); compute it in the same way"
            )
    return np.array([item.embedding for item in items], dtype=np.float32)


def _neighbors(
    bundle: Bundle,
    vectors: Float32[np.ndarray, "N E"],
    item_id: Int64[np.ndarray, " R"],
    codes: Int64[np.ndarray, "R M"],
) -> list[list[Neighbor]]:
    """Return the nearest items of a catalog for each embedding."""
    table, levels = bundle.table, len(bundle.books)
    row, is_known = table.lookup(item_id)
    quantized = codes[:, :levels].copy()
    # An item that was moved to a free code stands nearer to the codes that it was quantized to.
    is_own = is_known & (table.sid[row] == codes).all(axis=1)
    quantized[is_own] = table.quantized[row[is_own]]
    sizes = np.array([len(book) for book in bundle.books])
    is_inside = ((quantized >= 0) & (quantized < sizes)).all(axis=1)
    ids = item_id[is_inside]
    rows, distances = nearest_items(
        bundle.projection(vectors), bundle.books, quantized[is_inside], _NEIGHBORS
    )
    return [
        [
            Neighbor(item_id=int(ids[row]), distance=float(distance))
            for row, distance in zip(*pair, strict=True)
        ]
        for pair in zip(rows, distances, strict=True)
    ]
