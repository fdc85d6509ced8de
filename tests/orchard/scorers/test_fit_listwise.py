"""The list evaluator and the reward that asks it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from orchard import ragged
from orchard.catalog import catalog as catalogs
from orchard.data.prompts import Split
from orchard.errors import CatalogError, ConfigError, DataError
from orchard.scorers import checkpoint
from orchard.scorers.fit_listwise import fit_listwise_ranker, measure
from orchard.scorers.listwise_ranker import ListwiseRanker
from orchard.settings import ListwiseConfig, RewardsConfig
from orchard.testing import tiny_catalog
from orchard.types import SearchTrees
from rewards.listwise import listwise
from rewards.registry import RewardContext
from rewards.score import preload

Grow = Callable[..., SearchTrees]
ITEMS = catalogs.from_codes([[0, 1], [0, 2], [1, 0], [0, 1], [1, 3], [2, 0]])
SIZES = {
    "num_items": 6, "num_leaves": 5, "max_history": 4, "hidden_size": 8, "layers": 2, "heads": 2,
}  # fmt: skip


def model_of(*, unknown: tuple[int, ...] = ()) -> ListwiseRanker:
    """A random model that knows all leaves but some."""
    torch.manual_seed(0)
    model = ListwiseRanker(**SIZES).eval()
    model.leaf_of_item[:] = torch.from_numpy(ITEMS.leaf_of_item)
    model.trained[:] = True
    model.trained[list(unknown)] = False
    return model


def saved(model: ListwiseRanker, folder: Path) -> RewardContext:
    checkpoint.save(model, folder, kind="listwise", catalog=ITEMS, sizes=SIZES, facts={})
    return RewardContext(
        catalog=ITEMS, settings=RewardsConfig(listwise=ListwiseConfig(path=folder))
    )


def with_history(trees: SearchTrees, rows: list[list[int]]) -> SearchTrees:
    start = ragged.starts(np.array([len(row) for row in rows]))
    history = np.array([item for row in rows for item in row], np.int64)
    return replace(trees, prompts=replace(trees.prompts, history=history, history_start=start))


def test_rivals_change_a_candidates_worth_and_their_order_does_not(
    trees_with: Grow, tmp_path: Path
) -> None:
    known = saved(model_of(), tmp_path)
    grown = trees_with(ITEMS, [[0, 2, 4], [4, 0, 2], [0, 2, 3]], targets=[0, 0, 0])
    found = listwise(with_history(grown, [[1, 5]] * 3), known).reshape(3, 3)
    np.testing.assert_allclose(found[1, [1, 2, 0]], found[0], rtol=1e-5)
    assert found[0, 0] - found[0, 1] != pytest.approx(found[2, 0] - found[2, 1], rel=1e-3)
    np.testing.assert_allclose(np.exp(found.astype(np.float64)).sum(1), 1, rtol=1e-5)


def test_a_list_is_judged_alike_in_any_batch_and_repeats_count_once(
    trees_with: Grow, tmp_path: Path
) -> None:
    known = saved(model_of(), tmp_path)
    both = with_history(
        trees_with(ITEMS, [[1, 3], [0, 2, 0, 4]], targets=[0, 0]), [[5], [2, 0, 2, 1, 4]]
    )
    together = listwise(both, known)
    alone = with_history(trees_with(ITEMS, [[0, 2, 4]], targets=[0]), [[0, 2, 1, 4]])
    np.testing.assert_allclose(together[[2, 3, 5]], listwise(alone, known), rtol=1e-5)
    assert together[4] == together[2]


def test_what_the_model_does_not_know_neither_gains_nor_loses(
    trees_with: Grow, tmp_path: Path
) -> None:
    known = saved(model_of(unknown=(1,)), tmp_path)
    only = int(np.flatnonzero(ITEMS.leaf_of_item == 1)[0])
    grown = trees_with(ITEMS, [[0, 1, 4], [0, 4], [1]], targets=[0, 0, 0])
    found = listwise(with_history(grown, [[5, only], [only], [5]]), known)
    assert found[1] == pytest.approx((found[0] + found[2]) / 2, rel=1e-5)
    np.testing.assert_allclose(np.exp(found[[0, 2]].astype(np.float64)).sum(), 1, rtol=1e-5)
    assert found[3:].tolist() == [0] * 3


def test_a_missing_or_foreign_model_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run `orchard fit listwise`"):
        preload({"listwise": 1.0}, RewardContext(catalog=ITEMS, folder=tmp_path))
    known = saved(model_of(), tmp_path)
    preload({"listwise": 1.0}, known)
    with pytest.raises(CatalogError, match="was fitted on catalog"):
        preload({"listwise": 1.0}, replace(known, catalog=tiny_catalog()))


@pytest.mark.slow
def test_fitting_learns_what_follows_what_and_equal_seeds_give_equal_models() -> None:
    items = catalogs.from_codes([[code // 4, code % 4] for code in range(12)])
    at = np.arange(240)
    split = Split(
        user=at,
        history=np.stack([at % 12, (at + 1) % 12], 1).reshape(-1),
        history_start=np.arange(241) * 2,
        target=(at + 2) % 12,
    )
    settings = ListwiseConfig(
        hidden_size=16, layers=1, epochs=20, batch_size=16, lr=1e-2, dropout=0.0, list_size=4
    )

    def fitted() -> ListwiseRanker:
        return fit_listwise_ranker(split, split, items, settings, max_history=4, seed=1)

    model = fitted()
    found = measure(model, split, split, settings, seed=1)
    assert found["hit@1/list"] > 0.9 > found["chance"] == 0.25
    again = fitted().state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    few = settings.model_copy(update={"list_size": 13})
    with pytest.raises(DataError, match="12 distinct semantic IDs and a list takes 13"):
        fit_listwise_ranker(split, split, items, few, max_history=4, seed=1)
