"""Fitting the list evaluator: pick the target out of a list of plausible others.

Half of the others, by default, are neighbours of the target in the trie, whose codes begin alike: a
beam's candidates look so. The rest are drawn as often as they are targets. Which they are depends
on the seed and the epoch alone.

Shapes:  R rows   Q rows of a batch   G candidates of a list   K leaves
"""

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from orchard import ragged
from orchard.catalog.catalog import Catalog
from orchard.data.prompts import Split
from orchard.errors import DataError
from orchard.scorers.fit_sasrec import Tell, batches, best_epoch
from orchard.scorers.listwise_ranker import ListwiseRanker
from orchard.settings import ListwiseConfig

_VALID, _TEST = 1 << 20, 1 << 21
"""Epoch numbers that stand for the lists of the validation and the test rows."""
_NEIGHBOURHOOD = 32
"""Leaves on either side of the target from which its neighbours are drawn."""


def fit_listwise_ranker(
    train: Split,
    valid: Split,
    catalog: Catalog,
    settings: ListwiseConfig,
    *,
    max_history: int,
    seed: int,
    tell: Tell = lambda epoch, loss, hit: None,
) -> ListwiseRanker:
    """The epoch of the most targets ranked first in their lists; equal seeds give equal models."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ListwiseRanker(
            num_items=len(catalog),
            num_leaves=catalog.trie.num_leaves,
            max_history=max_history,
            hidden_size=settings.hidden_size,
            layers=settings.layers,
            heads=settings.heads,
            dropout=settings.dropout,
        )
        model.leaf_of_item[:] = torch.from_numpy(catalog.leaf_of_item)
        seen = catalog.leaf_of_item[np.union1d(train.history, train.target)]
        model.trained[torch.from_numpy(seen)] = True
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
        )
        lists = Lists(train, model, settings, seed)
        epoch = iter(range(settings.epochs))

        def learn() -> list[float]:
            now = next(epoch)
            order = np.random.default_rng((seed, now)).permutation(len(train))
            losses: list[float] = []
            for rows in batches(order, settings.batch_size):
                logprob, fits = lists.read(train, rows, now)
                loss = -logprob[fits, 0].mean()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            return losses

        best_epoch(
            model,
            settings,
            learn=learn,
            judge=lambda: float(_hits(lists, valid, _VALID, settings.batch_size).mean()),
            tell=tell,
        )
    return model


def measure(
    model: ListwiseRanker, train: Split, test: Split, settings: ListwiseConfig, seed: int
) -> dict[str, float]:
    """Share of test targets ranked first in their lists, and what chance would come to."""
    hit = _hits(Lists(train, model, settings, seed), test, _TEST, settings.batch_size)
    return {"hit@1/list": float(hit.mean()), "chance": 1 / settings.list_size}


class Lists:
    """Lists of a target and others, and what the model makes of them."""

    def __init__(
        self, train: Split, model: ListwiseRanker, settings: ListwiseConfig, seed: int
    ) -> None:
        """Others are drawn among the leaves of the training rows."""
        self._model, self._settings, self._seed = model, settings, seed
        self._leaf_of_item = model.leaf_of_item.numpy()
        self._popular = self._leaf_of_item[train.target]
        self._known = np.flatnonzero(model.trained.numpy())
        if len(self._known) < settings.list_size:
            raise DataError(
                f"the training rows name {len(self._known)} distinct semantic IDs and a list takes "
                f"{settings.list_size}; lower rewards.listwise.list_size"
            )

    def draw(self, target: Int64[np.ndarray, " Q"], key: tuple[int, ...]) -> Int64[Tensor, "Q G"]:
        """The target first, then others that are not it; they may repeat."""
        draw, size = np.random.default_rng((self._seed, *key)), self._settings.list_size - 1
        shape = (len(target), size)
        far = self._popular[draw.integers(len(self._popular), size=shape)]
        place = np.searchsorted(self._known, target)[:, None]
        step = draw.integers(1, _NEIGHBOURHOOD + 1, size=shape) * draw.choice((-1, 1), size=shape)
        near = self._known[(place + step) % len(self._known)]
        other = np.where(draw.random(shape) < self._settings.near, near, far)
        after = self._known[(place + 1) % len(self._known)]  # never the target itself
        other = np.where(other == target[:, None], after, other)
        return torch.from_numpy(np.concatenate([target[:, None], other], 1))

    def read(
        self, split: Split, rows: Int64[np.ndarray, " Q"], epoch: int
    ) -> tuple[Tensor, Bool[Tensor, " Q"]]:
        """Log-probabilities in the lists of some rows, and which rows the model can judge."""
        history, start = ragged.take(split.history, split.history_start, rows)
        target = self._leaf_of_item[split.target[rows]]
        before = self._model.recent(history, start)
        fits = (before != self._model.num_leaves).any(1) & self._model.trained[target]
        return self._model(before, self.draw(target, (epoch, int(rows[0])))), fits


@torch.no_grad()
def _hits(lists: Lists, split: Split, epoch: int, size: int) -> Float64[np.ndarray, " R"]:
    """1 where the target is alone ahead of its list; a row that cannot be judged is a miss."""
    found: list[Tensor] = []
    for rows in batches(np.arange(len(split)), size):
        logprob, fits = lists.read(split, rows, epoch)
        found.append((logprob[:, :1] > logprob[:, 1:]).all(1) & fits)
    return torch.cat(found).double().numpy()
