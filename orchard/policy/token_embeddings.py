"""Extend a text model by code tokens: tokenizer entries and rows of the embeddings and head."""

from typing import cast

import numpy as np
import torch
from scipy.spatial.distance import cdist
from torch import Tensor, nn
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from orchard.catalog.catalog import Catalog
from orchard.errors import CatalogError, CheckpointError, DataError
from orchard.policy.code_tokens import find_spelling
from orchard.policy.growth import Growth
from orchard.policy.item_tokenizer import PAD, THINK, THOUGHT, ItemTokenizer
from orchard.policy.model import head_weight

_SPREAD = 1e-2
"""Noise of new rows around the mean, in standard deviations of the old rows. No two new rows are
equal, so that ties among siblings are not resolved by the order of the catalog."""
_NEIGHBORS = 5
"""Number of codes whose rows a code that no item had starts from."""


def add_tokens(tokenizer: PreTrainedTokenizerBase, catalog: Catalog, *, tags: bool = False) -> int:
    """Add the missing tokens of codes, and of thinking tags if `tags`; return the number added.

    No code is missing where the tokenizer has all of them in a spelling of its own.

    Raises:
        CatalogError: a code is still split into several tokens, or there are several spellings.
        DataError: the tokenizer has no `eos_token`.
    """
    if tokenizer.eos_token is None:
        raise DataError("the policy's tokenizer has no eos_token, which ends a text; give it one")
    vocabulary = tokenizer.get_vocab()
    codes = find_spelling(vocabulary, catalog.level_size).tokens(catalog.level_size)
    required = [*([THINK, THOUGHT] if tags else []), *codes]
    missing = [
        AddedToken(token, special=True, normalized=False)
        for token in required
        if token not in vocabulary
    ]
    if tokenizer.pad_token is None and PAD not in vocabulary:
        missing.append(AddedToken(PAD, special=True, normalized=False))
    tokenizer.add_tokens(missing, special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = PAD
    vocabulary = tokenizer.get_vocab()
    rows: list[list[int]] = tokenizer(codes, add_special_tokens=False)["input_ids"]
    split = [
        (code, row) for code, row in zip(codes, rows, strict=True) if row != [vocabulary[code]]
    ]
    if split:
        raise CatalogError(
            f"the policy's tokenizer cuts {split[0][0]} into {len(split[0][1])} tokens "
            f"({len(split)} of {len(codes)} codes); make them added tokens of the tokenizer"
        )
    return len(missing)


def check_rows(rows: int, *, known: int) -> None:
    """Raise CheckpointError if a model has fewer `rows` than its tokenizer has `known` tokens.

    Such tokens would get rows that nobody has trained, and no error would say so.
    """
    if rows < known:
        raise CheckpointError(
            f"the tokenizer has {known} tokens and the model's embedding table {rows} rows: tokens "
            f"{rows} to {known - 1} were added without resizing the model; take the tokenizer that "
            "belongs to the model, or resize and train the model first"
        )


def resize_embeddings(model: PreTrainedModel, *, known: int, size: int, seed: int) -> None:
    """Resize embeddings and head to `size` tokens in place; the tokens from `known` on are new.

    A new row is the mean of the known rows plus a little noise, so that a new token is initially as
    likely as the average token (Hewitt 2021, "Initializing new word embeddings for pretrained
    language models"). Rows beyond `size`, with which some models are padded, are removed.

    Raises:
        CheckpointError: the tokenizer knows tokens for which the model has no row.
    """
    rows = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    check_rows(min(rows, head_weight(model).shape[0]), known=known)
    model.resize_token_embeddings(size, mean_resizing=False)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for table in _tables(model):
            old = table[:known]
            noise = torch.randn(size - known, table.shape[1], generator=draw)
            table[known:] = old.mean(0) + _SPREAD * old.std(0) * noise


def start_unseen(
    model: PreTrainedModel, tokenizer: ItemTokenizer, growth: Growth, *, seed: int
) -> None:
    """Start the rows of codes that no item had from the rows of their neighbors, in place.

    A new row is the mean of those of the nearest codes of its level that items had, by the
    centroids of the codebook, plus a little noise. A level without a codebook takes all of them.
    """
    draw = torch.Generator().manual_seed(seed)
    for level, seen in enumerate(growth.seen):
        if seen.all():
            continue
        known, unseen = np.flatnonzero(seen), np.flatnonzero(~seen)
        if level < len(growth.books):
            book = growth.books[level].astype(np.float64)
            distance = cdist(book[unseen], book[known])
            near = known[np.argsort(distance, axis=1, kind="stable")[:, :_NEIGHBORS]]
        else:
            near = np.broadcast_to(known, (len(unseen), len(known)))
        token = tokenizer.tokens_at(level)
        target, source = token[torch.from_numpy(unseen)], token[torch.from_numpy(near.copy())]
        with torch.no_grad():
            for table in _tables(model):
                noise = torch.randn(len(unseen), table.shape[1], generator=draw)
                spread = table[token[torch.from_numpy(known)]].std(0, unbiased=False)
                # [unseen codes, neighbors, width of the table] averaged over the neighbors
                table[target] = table[source].mean(1) + _SPREAD * spread * noise


def _tables(model: PreTrainedModel) -> list[Tensor]:
    """Return the embeddings and the head of a model, once where they are the same."""
    embedding = cast(nn.Embedding, model.get_input_embeddings()).weight
    head = head_weight(model)
    return [embedding] if head is embedding else [embedding, head]
