"""SASRec and the reward that asks it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from orchard import ragged
from orchard.catalog import catalog as catalogs
from orchard.data.prompts import Split
from orchard.errors import CatalogError, CheckpointError, ConfigError
from orchard.evaluation.ranking import TargetRanks
from orchard.scorers import checkpoint
from orchard.scorers.fit_sasrec import fit_sasrec, sasrec_ranks
from orchard.scorers.sasrec import SasRec, leaf_logits
from orchard.settings import CollaborativeConfig, RewardsConfig
from orchard.testing import tiny_catalog
from orchard.types import SearchTrees
from rewards.collaborative import collaborative
from rewards.registry import RewardContext
from rewards.score import preload

Grow = Callable[..., SearchTrees]
ITEMS = catalogs.from_codes([[0, 1], [0, 2], [1, 0], [0, 1], [1, 3], [2, 0]])
SIZES = {"num_items": 6, "max_history": 4, "hidden_size": 8, "layers": 2, "heads": 2}


def model_of(*, unknown: tuple[int, ...] = (), seed: int = 0) -> SasRec:
    """A random model that knows all items but some."""
    torch.manual_seed(seed)
    model = SasRec(**SIZES).eval()
    model.trained[:] = True
    model.trained[list(unknown)] = False
    return model


def saved(model: SasRec, folder: Path) -> RewardContext:
    checkpoint.save(model, folder, kind="collaborative", catalog=ITEMS, sizes=SIZES, facts={})
    settings = RewardsConfig(collaborative=CollaborativeConfig(path=folder))
    return RewardContext(catalog=ITEMS, settings=settings)


def walk(rows: list[list[int]]) -> Split:
    """Rows of a history and a target."""
    history = [np.array(row[:-1]) for row in rows]
    return Split(
        user=np.arange(len(rows)),
        history=np.concatenate(history),
        history_start=ragged.starts(np.array([len(row) for row in history])),
        target=np.array([row[-1] for row in rows]),
    )


def test_a_state_depends_on_nothing_after_it() -> None:
    model = model_of()
    with torch.no_grad():
        one = model(torch.tensor([[0, 3, 1, 6]]))
        other = model(torch.tensor([[0, 3, 5, 2]]))
        assert not torch.allclose(one[:, 2:], other[:, 2:])
    torch.testing.assert_close(one[:, :2], other[:, :2])


def test_a_history_is_read_alike_in_any_batch_and_from_its_recent_items() -> None:
    model = model_of()
    together, known = model.last_states(np.array([1, 0, 2, 4, 5, 3, 1]), np.array([0, 1, 1, 7]))
    alone, _ = model.last_states(np.array([4, 5, 3, 1]), np.array([0, 4]))
    torch.testing.assert_close(together[2:], alone)
    assert known.tolist() == [True, False, True]


def test_a_leafs_logit_is_the_log_of_the_sum_over_its_items() -> None:
    model, leaf = model_of(), ITEMS.leaf_of_item
    found = leaf_logits(
        model, ITEMS, np.array([2, 1]), np.array([0, 2]), np.zeros(6, np.int64), leaf
    )
    with torch.no_grad():
        logit = (model(torch.tensor([[2, 1]]))[0, 1] @ model.item.weight[:-1].T).double().numpy()
    expected = logit.copy()
    expected[[0, 3]] = np.logaddexp(logit[0], logit[3])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_what_the_model_does_not_know_neither_gains_nor_loses(
    trees_with: Grow, tmp_path: Path
) -> None:
    known = saved(model_of(unknown=(1, 2, 4)), tmp_path)
    leaf = ITEMS.leaf_of_item[[0, 1, 5, 2]]
    trees = trees_with(ITEMS, [leaf, leaf[[1, 3]], leaf], targets=[0, 0, 0])
    history = np.array([1, 5, 5, 2, 4])  # 5 after an unknown item; 5; two unknown items
    prompts = replace(trees.prompts, history=history, history_start=np.array([0, 2, 3, 5]))
    found = collaborative(replace(trees, prompts=prompts), known)
    assert found[1] == found[3] == pytest.approx((found[0] + found[2]) / 2, rel=1e-5)
    assert found[0] != found[2]
    assert found[4:].tolist() == [0] * 6


def test_a_saved_model_answers_as_it_did(trees_with: Grow, tmp_path: Path) -> None:
    model = model_of()
    known = saved(model, tmp_path)
    trees = trees_with(ITEMS, [[0, 2, 4]], targets=[0])
    prompts = trees.prompts
    expected = leaf_logits(
        model, ITEMS, prompts.history, prompts.history_start, np.zeros(3, np.int64), trees.leaf
    )
    np.testing.assert_allclose(collaborative(trees, known), expected, rtol=1e-6)


def test_a_missing_foreign_or_damaged_model_is_refused_before_anything_starts(
    tmp_path: Path,
) -> None:
    weights = {"collaborative": 1.0}
    with pytest.raises(ConfigError, match="run `orchard fit collaborative`"):
        preload(weights, RewardContext(catalog=ITEMS, folder=tmp_path))
    known = saved(model_of(), tmp_path)
    preload(weights, known)
    other = RewardContext(catalog=tiny_catalog(), settings=known.settings)
    with pytest.raises(CatalogError, match="was fitted on catalog"):
        preload(weights, other)
    (tmp_path / checkpoint.WEIGHTS).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="fit it again"):
        preload(weights, RewardContext(catalog=ITEMS, settings=known.settings))
    checkpoint.save(model_of(), tmp_path, kind="other", catalog=ITEMS, sizes=SIZES, facts={})
    with pytest.raises(CheckpointError, match="a model for other"):
        preload(weights, RewardContext(catalog=ITEMS, settings=known.settings))
    (tmp_path / checkpoint.ABOUT).write_text("{}")
    with pytest.raises(CheckpointError, match="does not describe a fitted model"):
        preload(weights, RewardContext(catalog=ITEMS, settings=known.settings))


@pytest.mark.slow
def test_fitting_learns_what_follows_what_and_equal_seeds_give_equal_models() -> None:
    rows = [[at % 5, (at + 1) % 5, (at + 2) % 5] for at in range(40)]
    settings = CollaborativeConfig(
        hidden_size=16, layers=1, epochs=12, batch_size=8, lr=1e-2, dropout=0.0
    )
    catalog = catalogs.from_codes([[code] for code in range(6)])
    split, told = walk(rows), list[int]()

    def fitted() -> SasRec:
        return fit_sasrec(
            split, split, catalog, settings, max_history=4, seed=1,
            tell=lambda epoch, loss, ndcg: told.append(epoch),
        )  # fmt: skip

    model = fitted()
    assert told[0] == 1
    ranks = sasrec_ranks(model, split, catalog, batch_size=7)
    assert (ranks.item == 0).mean() > 0.95
    assert not model.trained[5]
    # Of an item that no row has there is nothing to say, as target or as history.
    ranks = sasrec_ranks(model, walk([[0, 5], [5, 0]]), catalog)
    assert ranks.item.tolist() == [TargetRanks.MISS] * 2
    again = fitted().state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_ranks_are_those_of_a_sorted_list() -> None:
    model = model_of()
    ranks = sasrec_ranks(model, walk([[2, 1], [4, 0], [0, 3]]), ITEMS)
    for row, (last, target) in enumerate([(2, 1), (4, 0), (0, 3)]):
        with torch.no_grad():
            logit = (model(torch.tensor([[last]]))[0, 0] @ model.item.weight[:-1].T).tolist()
        assert sorted(logit, reverse=True).index(logit[target]) == ranks.item[row]
        leaf = ITEMS.leaf_of_item
        mass = [sum(np.exp(logit[i]) for i in range(6) if leaf[i] == k) for k in range(5)]
        assert sorted(mass, reverse=True).index(mass[leaf[target]]) == ranks.sid[row]
