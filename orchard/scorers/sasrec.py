"""Predict the next item of a sequence with SASRec (Kang and McAuley, arXiv 1808.09781).

SASRec is a causal transformer over item embeddings; the logit of an item after a history is the
dot product of its embedding with the last state. Items outside the training data are left out of
histories and get no score.

Shapes:  B prompts   H history items   I items   C candidates   R rows   S positions   D width
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor, nn

from orchard import ragged
from orchard.catalog.catalog import Catalog
from orchard.scorers.encoder import encoder

KIND = "collaborative"


class SasRec(nn.Module):
    """Pre-norm blocks over item and position embeddings; row `num_items` is padding."""

    trained: Bool[Tensor, " I"]
    """Whether each item occurs in the training rows."""

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
        """Initialize a model of these sizes with small random weights."""
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
        """Number of most recent items that the model reads."""
        return self.position.num_embeddings

    def forward(self, item: Int[Tensor, "R S"]) -> Float[Tensor, "R S D"]:
        """Compute the state after each item; padding on the right does not affect the items."""
        length = item.shape[1]
        position = torch.arange(length, device=item.device)
        tokens = self.drop(self.item(item) + self.position(position))
        is_future = position[:, None] < position
        return self.blocks(tokens, mask=is_future)

    @torch.no_grad()
    def last_states(
        self, history: Int64[np.ndarray, " H"], start: Int[np.ndarray, " B1"]
    ) -> tuple[Float[Tensor, "B D"], Bool[np.ndarray, " B"]]:
        """Return the state after each history, and whether the history has any training item."""
        is_known = self.trained.numpy()[history]
        count = np.bincount(ragged.row_of(start)[is_known], minlength=len(start) - 1)
        recent, bounds = ragged.last(history[is_known], ragged.starts(count), self.max_history)
        table = ragged.pad(recent, bounds, fill=self.item.num_embeddings - 1, width=1)
        length = np.diff(bounds)
        states = self(torch.from_numpy(table))
        last = torch.from_numpy(np.maximum(length - 1, 0))
        return states[torch.arange(len(length)), last], length > 0


@torch.no_grad()
def leaf_logits(
    model: SasRec,
    catalog: Catalog,
    history: Int64[np.ndarray, " H"],
    start: Int[np.ndarray, " B1"],
    prompt: Int64[np.ndarray, " C"],
    leaf: Int64[np.ndarray, " C"],
) -> Float64[np.ndarray, " C"]:
    """Compute the logit of each candidate leaf after its prompt's history, -inf if unknown.

    A leaf stands for all its items: their probabilities add up, so its logit is the log-sum-exp of
    theirs. A candidate is unknown if its leaf or its history has no training item.
    """
    state, has_state = model.last_states(history, start)
    count = np.diff(catalog.leaf_start)[leaf]
    # items of all candidates' leaves, concatenated; `owner` is the prompt of each
    item = catalog.item_of_leaf[ragged.ranges(catalog.leaf_start[leaf], count)]
    owner = np.repeat(prompt, count)
    product = (state[owner] * model.item(torch.from_numpy(item))).sum(1).double().numpy()
    is_known = has_state[owner] & model.trained.numpy()[item]
    logit = np.where(is_known, product, -np.inf)
    if len(leaf) == 0:
        return logit
    return np.logaddexp.reduceat(logit, ragged.starts(count)[:-1])
