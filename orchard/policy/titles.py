"""Title mode: an item is the text tokens of its title.

The codes of a title catalog stand for the distinct tokens of all titles, in the order of their
ids, and for the end marker, which is the tokenizer's `eos_token`. Unlike those of semantic IDs they
mean the same at every level, so that one slice of the policy's head serves all levels. Every title
carries the end marker, so that one may be the beginning of another, and a history of titles can be
read; where nothing but the end can follow it costs nothing. Items whose titles have the same tokens
share a leaf.

Shapes:  I items
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from orchard import ragged
from orchard.catalog import catalog as catalogs
from orchard.catalog.catalog import Catalog
from orchard.errors import CatalogError
from orchard.parquet import read_table
from orchard.policy.item_tokenizer import BOS, EOS, PAD


def make_title_tokenizer(title: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the given titles with the special tokens of compact policies.

    Every text has tokens in it, whatever its letters. Equal titles give equal tokenizers. There
    are fewer than `size` tokens where the titles hold no further pair that occurs twice.

    Raises:
        CatalogError: `size` has no room for the 256 bytes and the special tokens.
    """
    specials = [PAD, BOS, EOS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if size < len(alphabet) + len(specials):
        raise CatalogError(
            f"a vocabulary of {size} tokens has no room for {len(alphabet)} bytes and "
            f"{len(specials)} special tokens; raise data.title_tokens"
        )
    inner = Tokenizer(BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=specials,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    inner.train_from_iterator(title, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=PAD, bos_token=BOS, eos_token=EOS
    )


def read_titles(path: Path) -> list[str]:
    """The titles of an items file, empty where there is none; raises DataError as `read` does."""
    return [title or "" for title in _table(path)["title"].to_pylist()]


def from_titles(
    title: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    item_id: Int[np.ndarray, " I"] | None = None,
) -> Catalog:
    """A catalog of items given their titles.

    Args:
        title: one per item, tokenised as it stands, without special tokens.
        tokenizer: of the policy that is to write the titles.
        item_id: distinct identifiers; 0, 1, 2, ... by default.

    Raises:
        CatalogError: no items, a title without tokens or with the end marker inside it, a
            tokenizer without `eos_token`.
    """
    end = cast(int | None, tokenizer.eos_token_id)
    if end is None:
        raise CatalogError(
            "the tokenizer has no eos_token, which marks where a title ends; give it one"
        )
    if len(title) == 0:
        raise CatalogError("the catalog has no items; at least one is needed")
    rows: list[list[int]] = tokenizer(list(title), add_special_tokens=False)["input_ids"]
    empty = [row for row, tokens in enumerate(rows) if not tokens]
    _refuse(empty, title, item_id, "has no tokens; give it a title or leave it out of the items")
    ended = [row for row, tokens in enumerate(rows) if end in tokens]
    _refuse(ended, title, item_id, f"contains the end marker {tokenizer.eos_token}; remove it")
    start = ragged.starts(np.array([len(tokens) for tokens in rows]))
    distinct, code = np.unique(np.concatenate(rows), return_inverse=True)
    return catalogs.from_codes(
        [codes.tolist() for codes in np.split(code.reshape(-1), start[1:-1])],
        item_id=item_id,
        title=title,
        varying_depth=True,
        code_token=[*(int(token) for token in distinct), end],
    )


def read(path: Path, tokenizer: PreTrainedTokenizerBase) -> Catalog:
    """The catalog of an items file: Parquet columns `item_id` and `title`.

    Raises:
        DataError: the file or a column is missing, or unreadable.
        CatalogError: as `from_titles`.
    """
    table = _table(path)
    return from_titles(
        [title or "" for title in table["title"].to_pylist()],
        tokenizer,
        item_id=table["item_id"].to_numpy().astype(np.int64),
    )


def _table(path: Path) -> Any:
    return read_table(
        path, role="items", columns=("item_id", "title"), remedy="data.path and data.items"
    )


def _refuse(
    rows: Sequence[int], title: Sequence[str], item_id: Int[np.ndarray, " I"] | None, why: str
) -> None:
    """Raise CatalogError if there are such rows."""
    if rows:
        item = rows[0] if item_id is None else item_id[rows[0]]
        raise CatalogError(
            f"the title {title[rows[0]]!r} of item {item} {why} ({len(rows)} of {len(title)} items)"
        )
