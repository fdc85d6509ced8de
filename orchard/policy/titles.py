"""Build catalogs in title mode, in which an item is identified by the text tokens of its title.

The codes of a title catalog are the distinct tokens of all titles, in the order of their IDs, and
the end marker, which is the tokenizer's `eos_token`. Unlike the codes of semantic IDs they have the
same meaning at every level, so that all levels share one slice of the policy's head. Every title
has the end marker, so that one title may be a prefix of another and titles can be separated in a
history; where only the end can follow, the marker costs nothing. Items whose titles have the same
tokens share a leaf.

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
from orchard.policy.plain_text import encode_texts


def make_title_tokenizer(title: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the titles, with the special tokens of compact policies.

    It can encode every text. Equal titles give equal tokenizers. It has fewer than `size` tokens if
    the titles contain no further pair that occurs twice.

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
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=specials,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    backend.train_from_iterator(title, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, bos_token=BOS, eos_token=EOS
    )


def read_titles(path: Path) -> list[str]:
    """Read the titles of an items file, empty if missing; raises DataError like `read`."""
    return [title or "" for title in _read_items(path)["title"].to_pylist()]


def from_titles(
    title: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    item_id: Int[np.ndarray, " I"] | None = None,
) -> Catalog:
    """Create a catalog from the titles of its items.

    Args:
        title: one title per item, tokenized unchanged and without special tokens; also the name
            of one is text.
        tokenizer: tokenizer of the policy that generates the titles.
        item_id: distinct identifiers; 0, 1, 2, ... by default.

    Raises:
        CatalogError: there are no items, a title has no tokens or unknown words that become the end
            marker, or the tokenizer has no `eos_token`.
    """
    end = cast(int | None, tokenizer.eos_token_id)
    if end is None:
        raise CatalogError(
            "the tokenizer has no eos_token, which marks where a title ends; give it one"
        )
    if len(title) == 0:
        raise CatalogError("the catalog has no items; at least one is needed")
    rows = encode_texts(tokenizer, title)
    empty = [row for row, tokens in enumerate(rows) if not tokens]
    _reject(empty, title, item_id, "has no tokens; give it a title or leave it out of the items")
    ended = [row for row, tokens in enumerate(rows) if end in tokens]
    what = f"has words that the tokenizer reads as the end marker {tokenizer.eos_token}"
    _reject(ended, title, item_id, f"{what}; remove them")
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
    """Read the catalog of a Parquet items file with the columns `item_id` and `title`.

    Raises:
        DataError: the file or a column is missing or unreadable.
        CatalogError: see `from_titles`.
    """
    table = _read_items(path)
    return from_titles(
        [title or "" for title in table["title"].to_pylist()],
        tokenizer,
        item_id=table["item_id"].to_numpy().astype(np.int64),
    )


def _read_items(path: Path) -> Any:
    """Read the table of an items file with titles."""
    return read_table(
        path, role="items", columns=("item_id", "title"), remedy="data.path and data.items"
    )


def _reject(
    rows: Sequence[int], title: Sequence[str], item_id: Int[np.ndarray, " I"] | None, why: str
) -> None:
    """Raise CatalogError with the reason `why` if there are bad rows."""
    if rows:
        item = rows[0] if item_id is None else item_id[rows[0]]
        raise CatalogError(
            f"the title {title[rows[0]]!r} of item {item} {why} ({len(rows)} of {len(title)} items)"
        )
