"""Extend a text model by code tokens: tokenizer entries and rows of the embeddings and head."""

from typing import cast

import torch
from torch import nn
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from orchard.catalog.catalog import Catalog
from orchard.errors import CatalogError, CheckpointError, DataError
from orchard.policy.code_tokens import find_spelling
from orchard.policy.item_tokenizer import PAD, THINK, THOUGHT
from orchard.policy.model import head_weight

_SPREAD = 1e-2
"""Noise of new rows around the mean, in standard deviations of the old rows. No two new rows are
equal, so that ties among siblings are not resolved by the order of the catalog."""


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
    embedding = cast(nn.Embedding, model.get_input_embeddings()).weight
    head = head_weight(model)
    tables = [embedding] if head is embedding else [embedding, head]
    with torch.no_grad():
        for table in tables:
            old = table[:known]
            noise = torch.randn(size - known, table.shape[1], generator=draw)
            table[known:] = old.mean(0) + _SPREAD * old.std(0) * noise
