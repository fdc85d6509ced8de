"""Continue a policy on another catalog of its tokenizer bundle.

Shapes:  D dimensions of the codebooks
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32

from orchard.catalog import catalog as catalogs
from orchard.catalog.catalog import Catalog
from orchard.errors import CheckpointError
from orchard.policy.store import CATALOG, PolicyFacts, open_bundle
from orchard.semantic_ids.bundle import CODEBOOKS, Bundle


@dataclass(frozen=True, kw_only=True, eq=False)
class Growth:
    """Knowledge that a policy has of the codes of a catalog that it was not trained on."""

    before: Catalog
    """Catalog that the policy was trained on."""
    num_new: int
    """Number of items that it did not have."""
    seen: tuple[Bool[np.ndarray, " _"], ...]
    """Whether an item of that catalog has each code, level by level."""
    books: tuple[Float32[np.ndarray, "_ D"], ...]
    """Codebooks of the quantizer's levels; a level that counts colliding items has none."""

    @property
    def num_unseen(self) -> int:
        """Number of codes that no item had."""
        return sum(int((~seen).sum()) for seen in self.seen)

    def __str__(self) -> str:
        """Return a sentence for the log."""
        return (
            f"the policy of {len(self.before)} items ({self.before.digest[:12]}) goes on with "
            f"{self.num_new} new ones; {self.num_unseen} codes that no item had start from the "
            "mean of their nearest neighbors in the codebook"
        )


def growth_of(folder: Path, catalog: Catalog, bundle: Bundle | None) -> Growth | None:
    """Return what a policy knows of another catalog; None where it was trained on this one.

    Args:
        folder: a policy folder.
        catalog: catalog to go on with.
        bundle: its tokenizer bundle, the one that the policy carries or a later version of that.

    Raises:
        CheckpointError: the catalog is another one, and of no later version of the same bundle.
        DataError: the bundle of the policy is damaged.
    """
    facts = PolicyFacts.read(folder)
    if not facts.catalog or facts.catalog == catalog.digest:
        return None
    before = catalogs.load(folder / CATALOG)
    own = open_bundle(folder, before)
    why = _difference(own, bundle)
    if not why and before.level_size != catalog.level_size:
        why = f"their levels have {before.level_size} and {catalog.level_size} codes"
    if why:
        raise CheckpointError(
            f"the policy in {folder} was trained on catalog {facts.catalog[:12]}, the one in use "
            f"is {catalog.digest[:12]}, and {why}; use the items file that it was trained on, "
            "give new items their IDs by `orchard data encode --append` with its bundle, or start "
            "a new policy",
            code="catalog.mismatch",
        )
    assert own is not None
    _, is_known = before.lookup(catalog.item_id)
    return Growth(
        before=before,
        num_new=int((~is_known).sum()),
        seen=tuple(
            np.isin(np.arange(size), before.codes[:, level])
            for level, size in enumerate(before.level_size)
        ),
        books=own.books,
    )


def _difference(own: Bundle | None, later: Bundle | None) -> str:
    """Return why a bundle is not a later version of a policy's own; empty if it is."""
    if own is None:
        return "it carries no tokenizer bundle"
    if later is None:
        return "the data has no tokenizer bundle"
    books = own.files[CODEBOOKS], later.files[CODEBOOKS]
    if books[0] != books[1] or own.description != later.description:
        return f"their tokenizer bundles have codebooks {books[0][:12]} and {books[1][:12]}"
    row, is_known = later.table.lookup(own.table.item_id)
    moved = ~is_known | (later.table.sid[row] != own.table.sid).any(axis=1)
    if moved.any():
        item = own.table.item_id[int(np.argmax(moved))]
        return (
            f"the bundle of the data has other semantic IDs ({own.table.digest[:12]} and "
            f"{later.table.digest[:12]}), such as that of item {item}"
        )
    return ""
