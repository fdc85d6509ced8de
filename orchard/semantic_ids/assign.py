"""Assign semantic IDs of a tokenizer bundle to new items; items that have one keep it.

Shapes:  N new items   E dimensions of an embedding   L levels of the quantizer   M of the IDs
         T further items
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int, Int64

from orchard.errors import DataError
from orchard.semantic_ids import embed
from orchard.semantic_ids.bundle import Bundle
from orchard.semantic_ids.collisions import POLICIES, free_codes, free_ranks
from orchard.semantic_ids.item_table import ItemTable
from orchard.semantic_ids.quantize import CodedItems, residual_codes

Placed = tuple[Int64[np.ndarray, "N M"], Bool[np.ndarray, " N"]]
"""Semantic IDs, and which items found no free one and share another's."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Assigned:
    """Semantic IDs of new items."""

    items: ItemTable
    is_silent: Bool[np.ndarray, " N"]
    """Whether the embedding says nothing about the item, so that its ID does not either."""
    is_shared: Bool[np.ndarray, " N"]
    """Whether no free code was left and the item shares the ID of another."""

    @property
    def is_moved(self) -> Bool[np.ndarray, " N"]:
        """Whether another code than the nearest was assigned, because that was taken."""
        last = self.items.quantized.shape[1] - 1
        return self.items.sid[:, last] != self.items.quantized[:, last]


def _reassign(
    quantized: CodedItems, taken: Int[np.ndarray, "I M"], sizes: tuple[int, ...]
) -> Placed:
    last, is_full = free_codes(quantized, taken)
    return np.concatenate([quantized.codes[:, :-1], last[:, None]], axis=1), is_full


def _extra_level(
    quantized: CodedItems, taken: Int[np.ndarray, "I M"], sizes: tuple[int, ...]
) -> Placed:
    rank, is_full = free_ranks(quantized, taken, sizes[-1])
    return np.concatenate([quantized.codes, rank[:, None]], axis=1), is_full


def _keep(quantized: CodedItems, taken: Int[np.ndarray, "I M"], sizes: tuple[int, ...]) -> Placed:
    return quantized.codes, np.zeros(len(quantized.codes), dtype=bool)


Placement = Callable[[CodedItems, Int[np.ndarray, "I M"], tuple[int, ...]], Placed]
PLACEMENTS: Mapping[str, Placement] = {
    "reassign": _reassign,
    "extra_level": _extra_level,
    "keep": _keep,
}
"""Placement of new items beside those of a bundle by collision policy: a function from quantized
codes, the semantic IDs that are taken and the sizes of the levels."""


def assign(
    bundle: Bundle,
    item_id: Int[np.ndarray, " N"],
    vectors: Float32[np.ndarray, "N E"],
    *,
    taken: Int[np.ndarray, "T M"] | None = None,
    level_size: Sequence[int] | None = None,
    share_when_full: bool = False,
) -> Assigned:
    """Assign semantic IDs to items that a bundle does not have, by its collision policy.

    Args:
        bundle: the bundle, which is not changed (see `bundle.append`).
        item_id: identifiers of the items.
        vectors: their embeddings.
        taken: semantic IDs of further items than the bundle's.
        level_size: codes at each level that may be assigned; by default those of the bundle. Only a
            level that counts colliding items may have more.
        share_when_full: let an item share its nearest code where none is free below its prefix.

    Raises:
        DataError: the embeddings have another width than the bundle's, or no code is free below
            the prefix of an item.
    """
    check_width(bundle, vectors)
    sizes = tuple(level_size or bundle.description.level_size)
    quantized = quantize(bundle, vectors, level_size=sizes)
    others = bundle.table.sid if taken is None else np.concatenate([bundle.table.sid, taken])
    # Others matter only below the first codes of the new items, and as far as codes are assigned.
    is_near = np.isin(others[:, 0], quantized.codes[:, 0]) & (others < sizes).all(axis=1)
    place = PLACEMENTS[bundle.description.collisions]
    sid, is_full = place(quantized, others[is_near], sizes)
    if is_full.any() and not share_when_full:
        row = int(np.argmax(is_full))
        prefix = ", ".join(map(str, sid[row, :-1]))
        raise DataError(
            f"all {sizes[-1]} codes of the last level are taken below ({prefix}), where item "
            f"{item_id[row]} belongs ({int(is_full.sum())} of {len(is_full)} items find none); "
            "leave these items out, pass --share-when-full, or make semantic IDs with a larger "
            "last level"
        )
    level = len(bundle.books) - 1
    items = ItemTable(
        item_id=np.asarray(item_id, dtype=np.int64),
        quantized=quantized.codes,
        sid=sid,
        prior=np.zeros(len(sid)),
        distance=squared_distance(quantized, sid[:, level]),
        nearest=squared_distance(quantized, quantized.codes[:, level]),
        version=np.full(len(sid), bundle.version + 1),
    )
    is_silent = embed.lengths(vectors) <= bundle.description.least_length
    return Assigned(items=items, is_silent=is_silent, is_shared=is_full)


def quantize(
    bundle: Bundle,
    vectors: Float32[np.ndarray, "N E"],
    *,
    level_size: Sequence[int] | None = None,
    balanced: bool = False,
) -> CodedItems:
    """Quantize embeddings with the codebooks of a bundle, or the first codes of each level.

    `balanced` assigns the codes of items that a balanced quantizer was fitted to. A new item takes
    its nearest codes: its own would depend on the items that come with it.
    """
    books = bundle.books
    if level_size is not None:
        books = tuple(book[:size] for book, size in zip(books, level_size, strict=False))
    codes, last = residual_codes(bundle.projection(vectors), books, balanced=balanced)
    return CodedItems(codes=codes, codebook=books, last=last)


def repeat(bundle: Bundle, vectors: Float32[np.ndarray, "I E"]) -> Int64[np.ndarray, "I M"]:
    """Assign the items of version 1 anew from their embeddings, as when the bundle was made.

    Args:
        bundle: the bundle.
        vectors: embeddings of the items of version 1, in their order in the bundle.
    """
    check_width(bundle, vectors)
    quantized = quantize(bundle, vectors, balanced=bundle.description.quantiser == "balanced")
    first = bundle.table.take(bundle.table.version == 1)
    return POLICIES[bundle.description.collisions](quantized, first.prior).codes


def check_width(bundle: Bundle, vectors: Float32[np.ndarray, "N E"]) -> None:
    """Raise DataError if embeddings have another width than those of a bundle."""
    if vectors.shape[1] != bundle.description.dimensions:
        raise DataError(
            f"the embeddings have {vectors.shape[1]} dimensions, those of the bundle "
            f"{bundle.folder} have {bundle.description.dimensions} ({bundle.description.origin}); "
            "compute them in the same way"
        )


def squared_distance(
    quantized: CodedItems, code: Int[np.ndarray, " N"]
) -> Float32[np.ndarray, " N"]:
    """Return the squared distance of each item's residual to a code of the last codebook."""
    difference = quantized.last - quantized.codebook[-1][code]
    return np.einsum("nd,nd->n", difference, difference).astype(np.float32)
