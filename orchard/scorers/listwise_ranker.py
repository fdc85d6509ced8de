"""A list evaluator: which of these candidates does the user take, seeing all of them at once.

A transformer over the history and the candidates of one prompt, after the idea of FlashEvaluator
(arXiv 2603.02565): each candidate attends to the history and to every other candidate, so that the
whole list costs one forward pass and a candidate's worth depends on its rivals. Candidates carry no
position, so their order does not matter. Of items that its training never saw it has no opinion.

Shapes:  B prompts   H history items   S positions of a history   G longest list   C candidates
         I items   K leaves   D width
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn

from orchard import ragged
from orchard.catalog.catalog import Catalog
from orchard.scorers import checkpoint
from orchard.scorers.encoder import encoder

KIND = "listwise"


class ListwiseRanker(nn.Module):
    """Pre-norm blocks over history and candidates; row `num_leaves` of the embedding is padding."""

    trained: Bool[Tensor, " K"]
    """Leaves of items that occur in the training rows."""
    leaf_of_item: Int64[Tensor, " I"]

    def __init__(
        self,
        *,
        num_items: int,
        num_leaves: int,
        max_history: int,
        hidden_size: int,
        layers: int,
        heads: int,
        dropout: float = 0.0,
    ) -> None:
        """A model of the given sizes with small random weights."""
        super().__init__()
        self.leaf = nn.Embedding(num_leaves + 1, hidden_size, padding_idx=num_leaves)
        self.position = nn.Embedding(max_history, hidden_size)
        self.rival = nn.Parameter(torch.zeros(hidden_size))
        """Tells a candidate from an item of the history."""
        self.drop = nn.Dropout(dropout)
        self.blocks = encoder(hidden_size, layers=layers, heads=heads, dropout=dropout)
        self.worth = nn.Linear(hidden_size, 1)
        self.register_buffer("trained", torch.zeros(num_leaves, dtype=torch.bool))
        self.register_buffer("leaf_of_item", torch.zeros(num_items, dtype=torch.long))
        with torch.no_grad():
            for table in (self.leaf, self.position):
                table.weight.normal_(0.0, hidden_size**-0.5)
            self.rival.normal_(0.0, hidden_size**-0.5)
            self.leaf.weight[num_leaves] = 0

    @property
    def num_leaves(self) -> int:
        """Leaves of the catalog; also the number that pads."""
        return self.leaf.num_embeddings - 1

    @property
    def max_history(self) -> int:
        """Most recent items that the model reads."""
        return self.position.num_embeddings

    def forward(
        self, history: Int[Tensor, "B S"], leaf: Int[Tensor, "B G"]
    ) -> Float[Tensor, "B G"]:
        """Log-probability of each candidate within its list; -inf where there is padding.

        Args:
            history: leaves, oldest first, padded on the right.
            leaf: the candidates, padded on the right.
        """
        place = torch.arange(history.shape[1], device=history.device)
        before = self.leaf(history) + self.position(place)
        inside = self.drop(torch.cat([before, self.leaf(leaf) + self.rival], 1))
        padding = torch.cat([history, leaf], 1) == self.num_leaves
        # A list that is all padding would attend to nothing; what it reads then is thrown away.
        padding[:, 0] &= ~padding.all(1)
        state = self.blocks(inside, src_key_padding_mask=padding)[:, history.shape[1] :]
        worth = self.worth(state).squeeze(2)
        return worth.masked_fill(leaf == self.num_leaves, float("-inf")).log_softmax(1)

    def recent(
        self, history: Int64[np.ndarray, " H"], start: Int[np.ndarray, " B1"]
    ) -> Int64[Tensor, "B S"]:
        """Leaves of the latest items that the model knows, as `forward` takes them."""
        leaf = self.leaf_of_item.numpy()[history]
        known = self.trained.numpy()[leaf]
        bounds = ragged.starts(np.bincount(ragged.owners(start)[known], minlength=len(start) - 1))
        kept, bounds = ragged.last(leaf[known], bounds, self.max_history)
        return torch.from_numpy(ragged.pad(kept, bounds, fill=self.num_leaves, width=1))

    def score(
        self,
        history: Int64[np.ndarray, " H"],
        history_start: Int[np.ndarray, " B1"],
        leaf: Int64[np.ndarray, " C"],
        start: Int[np.ndarray, " B1"],
    ) -> Float[Tensor, " C"]:
        """Log-probability of each candidate among those of its list that are known.

        -inf where the leaf is unknown, and throughout where all of the history is.
        """
        before = self.recent(history, history_start)
        sure = self.trained.numpy()[leaf]
        shown = torch.from_numpy(
            ragged.pad(np.where(sure, leaf, self.num_leaves), start, fill=self.num_leaves, width=1)
        )
        found = self(before, shown)[ragged.owners(start), ragged.places(start)]
        silent = (before == self.num_leaves).all(1)[ragged.owners(start)]
        return found.masked_fill(silent | ~torch.from_numpy(sure), float("-inf"))


def load(folder: Path, catalog: Catalog) -> ListwiseRanker:
    """The model that `orchard fit listwise` left in a folder.

    Raises:
        ConfigError: there is none.
        CatalogError: it was fitted for another catalog.
        CheckpointError: it is something else, or damaged.
    """
    model = ListwiseRanker(**checkpoint.sizes(folder, kind=KIND, catalog=catalog))
    checkpoint.restore(model, folder)
    return model
