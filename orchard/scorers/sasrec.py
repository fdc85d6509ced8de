"""SASRec (Kang and McAuley, arXiv 1808.09781): what tends to follow a sequence of items.

A causal transformer over item embeddings; the logit of an item after a history is the product of
its embedding with the last state. Items that its training never saw are unknown to it: it reads
histories without them, and has no opinion of them.

Shapes:  B prompts   H history items   I items   C candidates   R rows   S positions   D width
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor, nn

from orchard import ragged
from orchard.catalog.catalog import Catalog
from orchard.scorers import checkpoint
from orchard.scorers.encoder import encoder

KIND = "collaborative"


class SasRec(nn.Module):
    """Pre-norm blocks over item and position embeddings; row `num_items` is padding."""

    trained: Bool[Tensor, " I"]
    """Items that occur in the training rows."""

    def __init__(
        self,
        *,
        num_items: int,
        max_history: int,
        hidden_size: int,
        layers: int,
        heads: int,
        dropout: float = 0.0,
    ) -> None:
        """A model of the given sizes with small random weights."""
        super().__init__()
        self.item = nn.Embedding(num_items + 1, hidden_size, padding_idx=num_items)
        self.position = nn.Embedding(max_history, hidden_size)
        self.drop = nn.Dropout(dropout)
        self.blocks = encoder(hidden_size, layers=layers, heads=heads, dropout=dropout)
        self.register_buffer("trained", torch.zeros(num_items, dtype=torch.bool))
        with torch.no_grad():
            for table in (self.item, self.position):
                table.weight.normal_(0.0, hidden_size**-0.5)
            self.item.weight[num_items] = 0

    @property
    def max_history(self) -> int:
        """Most recent items that the model reads."""
        return self.position.num_embeddings

    def forward(self, item: Int[Tensor, "R S"]) -> Float[Tensor, "R S D"]:
        """State after each item; padding on the right changes nothing before it."""
        length = item.shape[1]
        place = torch.arange(length, device=item.device)
        inside = self.drop(self.item(item) + self.position(place))
        later = place[:, None] < place
        return self.blocks(inside, mask=later)

    @torch.no_grad()
    def last_states(
        self, history: Int64[np.ndarray, " H"], start: Int[np.ndarray, " B1"]
    ) -> tuple[Float[Tensor, "B D"], Bool[np.ndarray, " B"]]:
        """State after each history, and whether it has any item that the model knows."""
        known = self.trained.numpy()[history]
        count = np.bincount(ragged.owners(start)[known], minlength=len(start) - 1)
        recent, bounds = ragged.last(history[known], ragged.starts(count), self.max_history)
        table = ragged.pad(recent, bounds, fill=self.item.num_embeddings - 1, width=1)
        length = np.diff(bounds)
        states = self(torch.from_numpy(table))
        last = torch.from_numpy(np.maximum(length - 1, 0))
        return states[torch.arange(len(length)), last], length > 0


def load(folder: Path, catalog: Catalog) -> SasRec:
    """The model that `orchard fit collaborative` left in a folder.

    Raises:
        ConfigError: there is none.
        CatalogError: it was fitted for another catalog.
        CheckpointError: it is something else, or damaged.
    """
    model = SasRec(**checkpoint.sizes(folder, kind=KIND, catalog=catalog))
    checkpoint.restore(model, folder)
    return model


@torch.no_grad()
def leaf_logits(
    model: SasRec,
    catalog: Catalog,
    history: Int64[np.ndarray, " H"],
    start: Int[np.ndarray, " B1"],
    prompt: Int64[np.ndarray, " C"],
    leaf: Int64[np.ndarray, " C"],
) -> Float64[np.ndarray, " C"]:
    """Logit of each candidate leaf after its prompt's history; -inf where there is no opinion.

    Items that share a leaf cannot be told apart: their probabilities add up, so the leaf's logit is
    the log-sum-exp of theirs.
    """
    state, known = model.last_states(history, start)
    count = np.diff(catalog.leaf_start)[leaf]
    item = catalog.item_of_leaf[ragged.ranges(catalog.leaf_start[leaf], count)]
    owner = np.repeat(prompt, count)
    product = (state[owner] * model.item(torch.from_numpy(item))).sum(1).double().numpy()
    sure = known[owner] & model.trained.numpy()[item]
    logit = np.where(sure, product, -np.inf)
    if len(leaf) == 0:
        return logit
    return np.logaddexp.reduceat(logit, ragged.starts(count)[:-1])
