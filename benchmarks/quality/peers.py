"""Benchmark other recommenders on the same rows, by their own libraries, with one evaluator.

`implicit` (item-kNN by cosine, TF-IDF and BM25, ALS, BPR), popularity, and the counted experts of a
guide. Settings are chosen by NDCG@10 on validation rows; test rows are scored once. Every model is
scored with the history in its lists and without it. `implicit` is not among the requirements:
`pip install implicit==0.7.3` before this bench.

A model is fitted on the items of each user's training rows. For a held-out row it sees the items
of the history, as the policies do: item-kNN and ALS fold the history in; BPR, which has no way to
fold in, scores items by the mean of the history's item factors.

Shapes:  R rows   I items   N list length
"""

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix

from benchmarks.quality.guide import WORLDS, World, expert_lists
from benchmarks.shared.measure import Report, Row, report
from benchmarks.shared.recipe import means
from cluster.training.measure import measure
from cluster.training.run import Run, prepare
from orchard import config, ragged
from orchard.data.prompts import Split
from orchard.evaluation.ranking import Evaluation
from orchard.guide import fit
from orchard.types import Cost, PolicyVersion
from rollout.candidates import Candidates

METRICS = ("ndcg@10/sid", "hr@1/sid", "hr@10/sid", "ndcg@10/item", "hr@10/item")
LENGTH = 50
Ranker = Callable[[Split, bool], Candidates]
"""Function of a split and of whether its histories are left out of the lists."""


def run(quick: bool) -> Report:
    """Tune and score every model on both data sets; `quick` has one setting of each."""
    rows = list[Row]()
    for world in WORLDS:
        rows += _world(world, quick)
    return report("peers", [], rows)


def _world(world: World, quick: bool) -> list[Row]:
    prepared = prepare(config.load(world.run_file, [f"name={world.name}-peers"]), "sft")
    table = list[Row]()
    for name, settings in _families(prepared).items():
        rankers = {spelt: make() for spelt, make in list(settings.items())[: 1 if quick else None]}
        for exclude in (False, True):
            quality = {
                spelt: _evaluate(prepared, prepared.valid, rank(prepared.valid, exclude))
                .metrics["ndcg@10/sid"].mean
                for spelt, rank in rankers.items()
            }  # fmt: skip
            chosen = max(quality, key=lambda spelt: quality[spelt])
            lists = rankers[chosen](prepared.test, exclude)
            table.append({
                "data": world.name, "model": name, "history": "left out" if exclude else "kept",
                "chosen": chosen, "valid ndcg@10/sid": quality[chosen],
            } | means(_evaluate(prepared, prepared.test, lists), METRICS))  # fmt: skip
    return table


def _families(prepared: Run) -> dict[str, dict[str, Callable[[], Ranker]]]:
    """Return the settings of each kind of model, by how they are spelt."""
    import implicit.als  # pyright: ignore[reportMissingImports]
    import implicit.bpr  # pyright: ignore[reportMissingImports]
    import implicit.nearest_neighbours as knn  # pyright: ignore[reportMissingImports]

    matrix = _user_items(prepared)
    kinds: Mapping[str, Any] = {
        "cosine": knn.CosineRecommender,
        "TF-IDF": knn.TFIDFRecommender,
        "BM25": knn.BM25Recommender,
    }  # fmt: skip
    return {
        "popularity": {"": lambda: _popularity(prepared)},
        "item-kNN (implicit)": {
            f"{kind}, {k} neighbors": lambda kind=kind, k=k: _folded(
                prepared, kinds[kind](K=k, num_threads=1), matrix
            )
            for kind, k in product(kinds, (20, 100, 500))
        },
        "ALS (implicit)": {
            f"{factors} factors, regularization {reg}, alpha {alpha}": (
                lambda factors=factors, reg=reg, alpha=alpha: _folded(
                    prepared,
                    implicit.als.AlternatingLeastSquares(
                        factors=factors, regularization=reg, alpha=alpha, iterations=15,
                        num_threads=1, random_state=0,
                    ),
                    matrix,
                )
            )
            for factors, reg, alpha in product((64, 128), (0.01, 0.1), (1.0, 20.0))
        },
        "BPR (implicit)": {
            f"{factors} factors, rate {rate}": lambda factors=factors, rate=rate: _by_factors(
                prepared,
                implicit.bpr.BayesianPersonalizedRanking(
                    factors=factors, learning_rate=rate, iterations=200, num_threads=1,
                    random_state=0,
                ),
                matrix,
            )
            for factors, rate in product((64, 128), (0.01, 0.05))
        },
        **{
            f"counted {name}": {"": lambda name=name: _expert(prepared, name)}
            for name in prepared.config.guide.experts
        },
    }  # fmt: skip


def _user_items(prepared: Run) -> csr_matrix:
    """Return which user has which item in the training rows."""
    rows, num_items = prepared.train, len(prepared.catalog.leaf_of_item)
    user = np.concatenate([rows.user[ragged.row_of(rows.history_start)], rows.user])
    item = np.concatenate([rows.history, rows.target])
    _, user = np.unique(user, return_inverse=True)
    pair = np.unique(user * num_items + item)
    data = np.ones(len(pair), np.float32)
    return csr_matrix((data, (pair // num_items, pair % num_items)), (user.max() + 1, num_items))


def _histories(prepared: Run, split: Split) -> csr_matrix:
    """Return which row has which item in its history."""
    num_items = len(prepared.catalog.leaf_of_item)
    pair = np.unique(ragged.row_of(split.history_start) * num_items + split.history)
    data = np.ones(len(pair), np.float32)
    return csr_matrix((data, (pair // num_items, pair % num_items)), (len(split), num_items))


def _folded(prepared: Run, model: Any, matrix: csr_matrix) -> Ranker:
    """Fit a model of `implicit` that recommends from a history."""
    model.fit(matrix, show_progress=False)
    options: dict[str, Any] = {}
    if hasattr(model, "item_factors"):
        options["recalculate_user"] = True

    def rank(split: Split, exclude: bool) -> Candidates:
        found, _ = model.recommend(
            np.arange(len(split)), _histories(prepared, split), N=LENGTH,
            filter_already_liked_items=exclude, **options,
        )  # fmt: skip
        return _listed(prepared, found)

    return rank


def _by_factors(prepared: Run, model: Any, matrix: csr_matrix) -> Ranker:
    """Fit a factor model, and rank items by the mean of the history's item factors."""
    model.fit(matrix, show_progress=False)
    factors = np.asarray(model.item_factors)

    def rank(split: Split, exclude: bool) -> Candidates:
        history = _histories(prepared, split)
        scores = np.asarray((history @ factors) @ factors.T)
        return _listed(prepared, _top(scores, history if exclude else None))

    return rank


def _popularity(prepared: Run) -> Ranker:
    count = np.bincount(prepared.train.target, minlength=len(prepared.catalog.leaf_of_item))

    def rank(split: Split, exclude: bool) -> Candidates:
        scores = np.tile(count.astype(np.float32), (len(split), 1))
        return _listed(prepared, _top(scores, _histories(prepared, split) if exclude else None))

    return rank


def _top(scores: np.ndarray, excluded: csr_matrix | None) -> np.ndarray:
    """Return the items of each row with the highest scores, ties by item."""
    if excluded is not None:
        row, item = excluded.nonzero()
        scores[row, item] = -np.inf
    best = np.argpartition(-scores, LENGTH, axis=1)[:, :LENGTH]
    order = np.lexsort((best, -np.take_along_axis(scores, best, 1)))
    return np.take_along_axis(best, order, 1)


def _expert(prepared: Run, name: str) -> Ranker:
    """Rank leaves by one counted expert."""
    guide = fit.count(prepared.catalog, prepared.leaf_rows, (name,))

    def rank(split: Split, exclude: bool) -> Candidates:
        return expert_lists(prepared, split, np.arange(len(split)), guide, name, exclude)

    return rank


def _evaluate(prepared: Run, split: Split, candidates: Candidates) -> Evaluation:
    rows, version = np.arange(len(split)), PolicyVersion(step=0, digest="")
    return measure(prepared, split, rows, candidates, LENGTH, version)


def _listed(prepared: Run, items: np.ndarray) -> Candidates:
    """Return item lists [R, N] as candidates: their leaves, which are what is evaluated."""
    leaf = prepared.catalog.leaf_of_item[items.ravel()]
    trie = prepared.catalog.trie
    node = trie.path(trie.node_of(torch.from_numpy(leaf))).numpy()
    return Candidates(
        start=np.arange(len(items) + 1) * items.shape[1], leaf=leaf, node=node, cost=Cost(),
        logprob=np.zeros(node.shape, np.float32), score=np.zeros(len(leaf), np.float32),
    )  # fmt: skip
