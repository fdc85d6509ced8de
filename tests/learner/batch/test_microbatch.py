"""Test the parts of a batch; the tests of the loss check that they add up to it."""

from collections.abc import Callable

import numpy as np
import pytest
from transformers import PreTrainedModel

from learner.advantage.estimators import ESTIMATORS
from learner.batch.microbatch import micro_batches, row_lengths, shard
from learner.batch.pack import pack
from orchard.catalog.catalog import Catalog
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.types import ScoredTrees, TrainBatch


@pytest.fixture(scope="module")
def batch(
    catalog: Catalog,
    policy: tuple[PreTrainedModel, ItemTokenizer],
    score_random: Callable[..., ScoredTrees],
) -> TrainBatch:
    """Return seven rows of different lengths."""
    scored = score_random([4, 2, 7, 12, 3, 16, 9])
    return pack(scored, [ESTIMATORS["group"](scored, 1e-4)], policy[1])


def signature(batch: TrainBatch) -> list[tuple[object, ...]]:
    """List every choice with the contents of its row, independent of the row's index."""
    rows = [tuple(row[:n]) for row, n in zip(batch.token, row_lengths(batch), strict=True)]
    return sorted(
        (rows[row], slot, edge, gain)
        for row, slot, edge, gain in zip(
            batch.row,
            batch.query_slot.tolist(),
            batch.chosen.tolist(),
            batch.advantage_pos.tolist(),
            strict=True,
        )
    )


@pytest.mark.parametrize("world", [1, 2, 3, 7, 10])
def test_shards_have_equally_many_rows_and_together_every_choice(
    batch: TrainBatch, world: int
) -> None:
    parts = [shard(batch, rank, world) for rank in range(world)]
    assert len({len(part.token) for part in parts}) == 1
    assert sorted(s for part in parts for s in signature(part)) == signature(batch)
    assert sum(part.forward_tokens for part in parts) == batch.forward_tokens


@pytest.mark.parametrize("max_tokens", [1, 30, 100, 10_000])
def test_micro_batches_keep_to_the_limit_unless_a_row_alone_exceeds_it(
    batch: TrainBatch, max_tokens: int
) -> None:
    parts = list(micro_batches(batch, max_tokens))
    assert all(part.token.size <= max_tokens or len(part.token) == 1 for part in parts)
    assert sorted(s for part in parts for s in signature(part)) == signature(batch)
    assert sum(part.forward_tokens for part in parts) == batch.forward_tokens
    assert all((row_lengths(part) > 0).all() for part in parts)


def test_sorting_by_length_leaves_little_padding(batch: TrainBatch) -> None:
    parts = list(micro_batches(batch, 3 * batch.token.shape[1]))
    assert sum(part.token.size for part in parts) < batch.token.size
    assert all((np.diff(row_lengths(part)) <= 0).all() for part in parts)


def test_a_shard_of_padding_alone_is_one_micro_batch(batch: TrainBatch) -> None:
    (part,) = micro_batches(shard(batch, 9, 10), 100)
    assert part.token.shape == (1, 1)
    assert part.forward_tokens == len(part.row) == 0


def test_rows_of_padding_are_not_forwarded_beside_others(batch: TrainBatch) -> None:
    part = shard(batch, 2, 3)
    assert (row_lengths(part) == 0).any()
    assert all((row_lengths(piece) > 0).all() for piece in micro_batches(part, 10_000))
