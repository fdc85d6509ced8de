"""Fitting the models that rewards ask, from the rows of a data set.

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
"""Called after each epoch with its number, its loss and its figure on the validation rows."""


def best_epoch(
    model: nn.Module,
    settings: ScorerConfig,
    *,
    learn: Callable[[], list[float]],
    judge: Callable[[], float],
    tell: Tell,
) -> None:
    """Train in place until `judge` has not risen for a while, and go back to where it was highest.

    `learn` is one epoch and returns the losses of its updates.
    """
    best, kept, since, began = -1.0, copy.deepcopy(model.state_dict()), 0, time.perf_counter()
    for epoch in range(1, settings.epochs + 1):
        model.train()
        losses = learn()
        model.eval()
        found = judge()
        tell(epoch, float(np.mean(losses)), found)
        since += 1
        if found > best:
            best, kept, since = found, copy.deepcopy(model.state_dict()), 0
        out_of_time = 0 < settings.minutes < (time.perf_counter() - began) / 60
        if since >= settings.patience or out_of_time:
            break
    model.load_state_dict(kept)


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
    """The epoch of the best NDCG@10 on the validation rows; equal seeds give equal models.

    Each window of a user's items is one sequence and every fresh item in it is predicted from all
    before it, by cross-entropy over all items.
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
        draw = np.random.default_rng(seed)

        def learn() -> list[float]:
            order = draw.permutation(len(windows))
            return [
                _learn(model, optimizer, windows, rows)
                for rows in batches(order, settings.batch_size)
            ]

        def judge() -> float:
            found = sasrec_ranks(model, valid, catalog)
            return float(np.where(found.item < 10, 1 / np.log2(found.item + 2.0), 0).mean())

        best_epoch(model, settings, learn=learn, judge=judge, tell=tell)
    return model


def sasrec_ranks(
    model: SasRec, split: Split, catalog: Catalog, *, batch_size: int = 512
) -> TargetRanks:
    """Rank of each row's target among all items, and of its leaf among all leaves.

    Equal scores count as better. A target that the model does not know is missed, and so is every
    target of a history of which it knows nothing.
    """
    item, sid = (np.full(len(split), TargetRanks.MISS, np.int64) for _ in range(2))
    unknown = ~model.trained.numpy()
    for rows in batches(np.arange(len(split)), batch_size):
        history, start = ragged.take(split.history, split.history_start, rows)
        state, known = model.last_states(history, start)
        with torch.no_grad():
            logit = (state @ model.item.weight[:-1].T).double().numpy()
        logit[:, unknown] = -np.inf
        leaf = np.logaddexp.reduceat(
            logit[:, catalog.item_of_leaf], catalog.leaf_start[:-1], axis=1
        )
        target, place = split.target[rows], np.arange(len(rows))
        own, own_leaf = logit[place, target], leaf[place, catalog.leaf_of_item[target]]
        better = (logit >= own[:, None]).sum(1) - 1
        item[rows] = np.where(known & np.isfinite(own), better, TargetRanks.MISS)
        better = (leaf >= own_leaf[:, None]).sum(1) - 1
        sid[rows] = np.where(known & np.isfinite(own_leaf), better, TargetRanks.MISS)
    return TargetRanks(sid=sid, item=item)


def metrics_of(ranks: TargetRanks) -> dict[str, float]:
    """The means of `orchard.evaluation.ranking.metrics`."""
    return {name: one.mean for name, one in ranking.metrics(ranks, width=50, resamples=1).items()}


def _learn(
    model: SasRec,
    optimizer: torch.optim.Optimizer,
    windows: TrainingWindows,
    rows: Int64[np.ndarray, " Q"],
) -> float:
    """One update on some windows; its loss."""
    padding = model.item.num_embeddings - 1
    item, start = ragged.take(windows.item, windows.start, rows)
    table = torch.from_numpy(ragged.pad(item, start, fill=padding, width=2))
    place = torch.arange(1, table.shape[1])
    fresh = torch.from_numpy(np.maximum(1, windows.fresh[rows]))
    learnt = (table[:, 1:] != padding) & (place >= fresh[:, None])
    state = model(table[:, :-1])[learnt]
    loss: Tensor = functional.cross_entropy(state @ model.item.weight[:-1].T, table[:, 1:][learnt])
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.item()


def batches(rows: Int64[np.ndarray, " R"], size: int) -> Iterator[Int64[np.ndarray, " Q"]]:
    """The rows in parts of a size, the last one perhaps smaller."""
    for at in range(0, len(rows), size):
        yield rows[at : at + size]
