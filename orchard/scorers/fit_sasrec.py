"""Fit SASRec on the rows of a data set, and the training loop that all scorers share.

Shapes:  R rows   Q windows   S positions   N positions with something to learn   I items   K leaves
"""

import copy
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.nn import functional

from orchard import ragged
from orchard.catalog.catalog import Catalog
from orchard.data.prompts import Split, TrainingWindows, make_windows
from orchard.evaluation import ranking
from orchard.evaluation.ranking import TargetRanks
from orchard.scorers.sasrec import SasRec
from orchard.settings import CollaborativeConfig, ScorerConfig

Tell = Callable[[int, float, float], None]
"""Callback after each epoch, called with its number, its loss and its validation score."""


def best_epoch(
    model: nn.Module,
    settings: ScorerConfig,
    *,
    learn: Callable[[], list[float]],
    judge: Callable[[], float],
    tell: Tell,
) -> None:
    """Train in place with early stopping, and restore the epoch with the highest score.

    `learn` trains one epoch and returns the losses of its updates; `judge` returns the validation
    score.
    """
    best, best_state, epochs_since_best, start_s = (
        -1.0,
        copy.deepcopy(model.state_dict()),
        0,
        time.perf_counter(),
    )
    for epoch in range(1, settings.epochs + 1):
        model.train()
        losses = learn()
        model.eval()
        score = judge()
        tell(epoch, float(np.mean(losses)), score)
        epochs_since_best += 1
        if score > best:
            best, best_state, epochs_since_best = score, copy.deepcopy(model.state_dict()), 0
        out_of_time = 0 < settings.minutes < (time.perf_counter() - start_s) / 60
        if epochs_since_best >= settings.patience or out_of_time:
            break
    model.load_state_dict(best_state)


def fit_sasrec(
    train: Split,
    valid: Split,
    catalog: Catalog,
    settings: CollaborativeConfig,
    *,
    max_history: int,
    seed: int,
    tell: Tell = lambda epoch, loss, ndcg: None,
) -> SasRec:
    """Train SASRec and return the epoch with the best NDCG@10 on the validation rows.

    Each window of a user's items is one sequence, and every fresh item in it is predicted from all
    items before it by cross-entropy over the catalog. Equal seeds give equal models.
    """
    windows = make_windows(train, max_history=max_history)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SasRec(
            num_items=len(catalog),
            max_history=max_history,
            hidden_size=settings.hidden_size,
            layers=settings.layers,
            heads=settings.heads,
            dropout=settings.dropout,
        )
        model.trained[torch.from_numpy(np.union1d(train.history, train.target))] = True
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
        )
        rng = np.random.default_rng(seed)

        def learn() -> list[float]:
            order = rng.permutation(len(windows))
            return [
                _learn(model, optimizer, windows, rows)
                for rows in batches(order, settings.batch_size)
            ]

        def judge() -> float:
            ranks = sasrec_ranks(model, valid, catalog)
            return float(np.where(ranks.item < 10, 1 / np.log2(ranks.item + 2.0), 0).mean())

        best_epoch(model, settings, learn=learn, judge=judge, tell=tell)
    return model


def sasrec_ranks(
    model: SasRec,
    split: Split,
    catalog: Catalog,
    *,
    batch_size: int = 512,
    exclude_seen: bool = False,
) -> TargetRanks:
    """Return the rank of each target among all items, and of its leaf among all leaves.

    Equal scores count as better. A target outside the training items is a miss, and so is every
    target whose history has no training item. With `exclude_seen`, items of the leaves of the
    row's own history are left out, and a target among them is a miss.
    """
    item, sid = (np.full(len(split), TargetRanks.MISS, np.int64) for _ in range(2))
    unknown = ~model.trained.numpy()
    for rows in batches(np.arange(len(split)), batch_size):
        history, start = ragged.take(split.history, split.history_start, rows)
        state, has_state = model.last_states(history, start)
        with torch.no_grad():
            logit = (state @ model.item.weight[:-1].T).double().numpy()
        logit[:, unknown] = -np.inf
        if exclude_seen:
            seen = np.zeros((len(rows), catalog.trie.num_leaves), np.bool_)
            seen[ragged.row_of(start), catalog.leaf_of_item[history]] = True
            logit[seen[:, catalog.leaf_of_item]] = -np.inf
        # [Q, K] log-sum-exp of the logits of each leaf's items
        leaf_logit = np.logaddexp.reduceat(
            logit[:, catalog.item_of_leaf], catalog.leaf_start[:-1], axis=1
        )
        target, row_index = split.target[rows], np.arange(len(rows))
        target_logit, target_leaf_logit = (
            logit[row_index, target],
            leaf_logit[row_index, catalog.leaf_of_item[target]],
        )
        num_better = (logit >= target_logit[:, None]).sum(1) - 1
        item[rows] = np.where(has_state & np.isfinite(target_logit), num_better, TargetRanks.MISS)
        num_better = (leaf_logit >= target_leaf_logit[:, None]).sum(1) - 1
        sid[rows] = np.where(
            has_state & np.isfinite(target_leaf_logit), num_better, TargetRanks.MISS
        )
    return TargetRanks(sid=sid, item=item)


def metrics_of(ranks: TargetRanks) -> dict[str, float]:
    """Return the means of `orchard.evaluation.ranking.metrics`."""
    return {
        name: estimate.mean
        for name, estimate in ranking.metrics(ranks, width=50, resamples=1).items()
    }


def _learn(
    model: SasRec,
    optimizer: torch.optim.Optimizer,
    windows: TrainingWindows,
    rows: Int64[np.ndarray, " Q"],
) -> float:
    """Make one update on some windows and return its loss."""
    padding = model.item.num_embeddings - 1
    item, start = ragged.take(windows.item, windows.start, rows)
    table = torch.from_numpy(ragged.pad(item, start, fill=padding, width=2))
    position = torch.arange(1, table.shape[1])
    # first position that is a target; the first item of a window has no history to predict it from
    fresh = torch.from_numpy(np.maximum(1, windows.fresh[rows]))
    is_target = (table[:, 1:] != padding) & (position >= fresh[:, None])
    state = model(table[:, :-1])[is_target]
    loss: Tensor = functional.cross_entropy(
        state @ model.item.weight[:-1].T, table[:, 1:][is_target]
    )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.item()


def batches(rows: Int64[np.ndarray, " R"], size: int) -> Iterator[Int64[np.ndarray, " Q"]]:
    """Split the rows into batches of `size`; the last one may be smaller."""
    for first in range(0, len(rows), size):
        yield rows[first : first + size]
