"""A text model that learns the words for items: code tokens and rows of its embeddings for them."""

from typing import cast

import torch
from torch import nn
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from orchard.catalog.catalog import Catalog
from orchard.errors import CatalogError, DataError
from orchard.policy.item_tokenizer import PAD, THINK, THOUGHT, sid_token
from orchard.policy.model import head_weight

_SPREAD = 1e-2
"""Of new rows around the mean, in standard deviations of the old ones: no two are equal, and ties
among siblings do not fall to the order of the catalog."""


def add_tokens(tokenizer: PreTrainedTokenizerBase, catalog: Catalog, *, tags: bool = False) -> int:
    """Give the tokenizer a token for each code (and tag of thinking) that it lacks; how many.

    Raises:
        CatalogError: a code is read as several tokens all the same.
        DataError: the tokenizer has no `eos_token`.
    """
    if tokenizer.eos_token is None:
        raise DataError("the policy's tokenizer has no eos_token, which ends a text; give it one")
    codes = [sid_token(at, code) for at, n in enumerate(catalog.level_size) for code in range(n)]
    known, wanted = tokenizer.get_vocab(), [*([THINK, THOUGHT] if tags else []), *codes]
    missing = [AddedToken(t, special=True, normalized=False) for t in wanted if t not in known]
    if tokenizer.pad_token is None and PAD not in known:
        missing.append(AddedToken(PAD, special=True, normalized=False))
    tokenizer.add_tokens(missing, special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = PAD
    known = tokenizer.get_vocab()
    rows: list[list[int]] = tokenizer(codes, add_special_tokens=False)["input_ids"]
    cut = [(code, row) for code, row in zip(codes, rows, strict=True) if row != [known[code]]]
    if cut:
        raise CatalogError(
            f"the policy's tokenizer cuts {cut[0][0]} into {len(cut[0][1])} tokens "
            f"({len(cut)} of {len(codes)} codes); make them added tokens of the tokenizer"
        )
    return len(missing)


def resize_embeddings(model: PreTrainedModel, *, known: int, size: int, seed: int) -> None:
    """Resize embeddings and head to `size` tokens, in place; those from `known` on are new.

    A new row is the mean of the known ones, so that a new token is at first as likely as the
    average of all (Hewitt 2021, "Initializing new word embeddings for pretrained language models"),
    and a little noise. Rows beyond `size`, which some models are padded with, are cut off.
    """
    model.resize_token_embeddings(size, mean_resizing=False)
    draw = torch.Generator().manual_seed(seed)
    rows = cast(nn.Embedding, model.get_input_embeddings()).weight
    tables = [rows] if head_weight(model) is rows else [rows, head_weight(model)]
    with torch.no_grad():
        for table in tables:
            old = table[:known]
            noise = torch.randn(size - known, table.shape[1], generator=draw)
            table[known:] = old.mean(0) + _SPREAD * old.std(0) * noise
