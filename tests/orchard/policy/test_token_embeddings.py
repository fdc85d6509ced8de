"""Rows of new tokens, and tokens that never had any."""

import pytest
import torch

from orchard.errors import CheckpointError
from orchard.policy.token_embeddings import resize_embeddings
from orchard.testing import tiny_catalog, tiny_policy


def test_new_tokens_get_rows_and_known_ones_keep_theirs() -> None:
    model, tokenizer = tiny_policy(tiny_catalog())
    before = model.get_input_embeddings().weight.detach().clone()
    resize_embeddings(model, known=tokenizer.size, size=tokenizer.size + 5, seed=0)
    after = model.get_input_embeddings().weight
    assert len(after) == tokenizer.size + 5
    assert torch.equal(after[: tokenizer.size], before)
    assert len(after[tokenizer.size :].unique(dim=0)) == 5


def test_a_tokenizer_that_is_longer_than_the_table_gets_no_rows_of_its_own() -> None:
    model, tokenizer = tiny_policy(tiny_catalog())
    rows = tokenizer.size
    with pytest.raises(CheckpointError, match=f"tokens {rows} to {rows + 2} were added without"):
        resize_embeddings(model, known=rows + 3, size=rows + 9, seed=0)
    assert len(model.get_input_embeddings().weight) == rows
