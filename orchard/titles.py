"""Title mode: an item is the text tokens of its title.

The codes of a title catalogue stand for the distinct tokens of all titles, in the order of their
ids, and for the end marker, which is the tokenizer's `eos_token`. Unlike those of semantic IDs they
mean the same at every level, so that one slice of the policy's head serves all levels. Every title
carries the end marker, so that one may be the beginning of another, and a history of titles can be
read; where nothing but the end can follow it costs nothing. Items whose titles have the same tokens
share a leaf.

Shapes:  I items
"""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from orchard import catalogue as catalogues
from orchard import ragged
from orchard.catalogue import Catalogue
from orchard.errors import CatalogueError
from orchard.tables import read_table


def from_titles(
    title: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    item_id: Int[np.ndarray, " I"] | None = None,
) -> Catalogue:
    """A catalogue of items given their titles.

    Args:
        title: one per item, tokenised as it stands, without special tokens.
        tokenizer: of the policy that is to write the titles.
        item_id: distinct identifiers; 0, 1, 2, ... by default.

    Raises:
        CatalogueError: no items, a title without tokens or with the end marker inside it, a
            tokenizer without `eos_token`.
    """
    end = cast(int | None, tokenizer.eos_token_id)
    if end is None:
        raise CatalogueError(
            "the tokenizer has no eos_token, which marks where a title ends; give it one"
        )
    if len(title) == 0:
        raise CatalogueError("the catalogue has no items; at least one is needed")
    rows: list[list[int]] = tokenizer(list(title), add_special_tokens=False)["input_ids"]
    empty = [row for row, tokens in enumerate(rows) if not tokens]
    _refuse(empty, title, item_id, "has no tokens; give it a title or leave it out of the items")
    ended = [row for row, tokens in enumerate(rows) if end in tokens]
    _refuse(ended, title, item_id, f"contains the end marker {tokenizer.eos_token}; remove it")
    start = ragged.starts(np.array([len(tokens) for tokens in rows]))
    distinct, code = np.unique(np.concatenate(rows), return_inverse=True)
    return catalogues.from_codes(
        [codes.tolist() for codes in np.split(code.reshape(-1), start[1:-1])],
        item_id=item_id,
        title=title,
        varying_depth=True,
        code_token=[*(int(token) for token in distinct), end],
    )


def read(path: Path, tokenizer: PreTrainedTokenizerBase) -> Catalogue:
    """The catalogue of an items file: Parquet columns `item_id` and `title`.

    Raises:
        DataError: the file or a column is missing, or unreadable.
        CatalogueError: as `from_titles`.
    """
    table = read_table(
        path, role="items", columns=("item_id", "title"), remedy="data.path and data.items"
    )
    return from_titles(
        [title or "" for title in table["title"].to_pylist()],
        tokenizer,
        item_id=table["item_id"].to_numpy().astype(np.int64),
    )


def _refuse(
    rows: Sequence[int], title: Sequence[str], item_id: Int[np.ndarray, " I"] | None, why: str
) -> None:
    """Raise CatalogueError if there are such rows."""
    if rows:
        item = rows[0] if item_id is None else item_id[rows[0]]
        raise CatalogueError(
            f"the title {title[rows[0]]!r} of item {item} {why} ({len(rows)} of {len(title)} items)"
        )
