"""Fit the listwise ranker: select the target from a list of plausible negatives.

By default half of the negatives are neighbors of the target in the trie, with a common prefix, as
in the candidates of a beam. The rest are drawn by their frequency as targets. The draws depend only
on the seed and the epoch.

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
"""Epoch numbers that seed the lists of the validation and the test rows."""
_NEIGHBOURHOOD = 32
"""Number of leaves on either side of the target from which its neighbors are drawn."""


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
    """Train the ranker and return the epoch that ranks the most validation targets first.

    Equal seeds give equal models.
    """
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
            epoch_index = next(epoch)
            order = np.random.default_rng((seed, epoch_index)).permutation(len(train))
            losses: list[float] = []
            for rows in batches(order, settings.batch_size):
                logprob, is_scorable = lists.read(train, rows, epoch_index)
                loss = -logprob[is_scorable, 0].mean()
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
    """Return the share of test targets ranked first in their lists, and that of random ranking."""
    hit = _hits(Lists(train, model, settings, seed), test, _TEST, settings.batch_size)
    return {"hit@1/list": float(hit.mean()), "chance": 1 / settings.list_size}


class Lists:
    """Lists of a target and random negatives, drawn and scored by the model."""

    def __init__(
        self, train: Split, model: ListwiseRanker, settings: ListwiseConfig, seed: int
    ) -> None:
        """Collect the leaves of the training rows, from which negatives are drawn."""
        self._model, self._settings, self._seed = model, settings, seed
        self._leaf_of_item = model.leaf_of_item.numpy()
        self._target_leaves = self._leaf_of_item[train.target]
        self._trained_leaves = np.flatnonzero(model.trained.numpy())
        if len(self._trained_leaves) < settings.list_size:
            raise DataError(
                f"the training rows name {len(self._trained_leaves)} distinct semantic IDs and a "
                f"list takes {settings.list_size}; lower rewards.listwise.list_size"
            )

    def draw(self, target: Int64[np.ndarray, " Q"], key: tuple[int, ...]) -> Int64[Tensor, "Q G"]:
        """Draw a list for each target: the target, then other leaves, which may repeat."""
        rng, size = np.random.default_rng((self._seed, *key)), self._settings.list_size - 1
        shape = (len(target), size)
        popular_leaf = self._target_leaves[rng.integers(len(self._target_leaves), size=shape)]
        target_index = np.searchsorted(self._trained_leaves, target)[:, None]
        step = rng.integers(1, _NEIGHBOURHOOD + 1, size=shape) * rng.choice((-1, 1), size=shape)
        neighbor = self._trained_leaves[(target_index + step) % len(self._trained_leaves)]
        negative = np.where(rng.random(shape) < self._settings.near, neighbor, popular_leaf)
        next_leaf = self._trained_leaves[
            (target_index + 1) % len(self._trained_leaves)
        ]  # never the target itself
        negative = np.where(negative == target[:, None], next_leaf, negative)
        return torch.from_numpy(np.concatenate([target[:, None], negative], 1))

    def read(
        self, split: Split, rows: Int64[np.ndarray, " Q"], epoch: int
    ) -> tuple[Tensor, Bool[Tensor, " Q"]]:
        """Return log-probabilities in the lists of some rows, and which rows the model can score.

        The model can score a row if its training covers the target and part of the history.
        """
        history, start = ragged.take(split.history, split.history_start, rows)
        target = self._leaf_of_item[split.target[rows]]
        recent_leaves = self._model.recent(history, start)
        is_scorable = (recent_leaves != self._model.num_leaves).any(1) & self._model.trained[target]
        return self._model(recent_leaves, self.draw(target, (epoch, int(rows[0])))), is_scorable


@torch.no_grad()
def _hits(lists: Lists, split: Split, epoch: int, size: int) -> Float64[np.ndarray, " R"]:
    """Return 1 for rows whose target is strictly first; a row that cannot be scored is a miss."""
    hits: list[Tensor] = []
    for rows in batches(np.arange(len(split)), size):
        logprob, is_scorable = lists.read(split, rows, epoch)
        hits.append((logprob[:, :1] > logprob[:, 1:]).all(1) & is_scorable)
    return torch.cat(hits).double().numpy()
