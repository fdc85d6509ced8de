"""Rank the candidates of a prompt jointly with a small transformer.

The transformer reads the history and all candidates of one prompt, after the idea of FlashEvaluator
(arXiv 2603.02565): each candidate attends to the history and to every other candidate, so a whole
list costs one forward pass and a candidate's score depends on the others. Candidates have no
position embedding, so their order does not matter. Leaves outside the training data get no score.

Shapes:  B prompts   H history items   S positions of a history   G longest list   C candidates
         I items   K leaves   D width
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn

from orchard import ragged
from orchard.scorers.encoder import encoder

KIND = "listwise"


class ListwiseRanker(nn.Module):
    """Pre-norm blocks over history and candidates; row `num_leaves` of the embedding is padding."""

    trained: Bool[Tensor, " K"]
    """Whether items of each leaf occur in the training rows."""
    leaf_of_item: Int64[Tensor, " I"]
    """Leaf of each catalog item."""

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
        """Initialize a model of these sizes with small random weights."""
        super().__init__()
        self.leaf = nn.Embedding(num_leaves + 1, hidden_size, padding_idx=num_leaves)
        self.position = nn.Embedding(max_history, hidden_size)
        self.rival = nn.Parameter(torch.zeros(hidden_size))
        """Embedding added to candidates, which distinguishes them from history items."""
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
        """Number of leaves of the catalog, also used as the padding index."""
        return self.leaf.num_embeddings - 1

    @property
    def max_history(self) -> int:
        """Number of most recent items that the model reads."""
        return self.position.num_embeddings

    def forward(
        self, history: Int[Tensor, "B S"], leaf: Int[Tensor, "B G"]
    ) -> Float[Tensor, "B G"]:
        """Compute the log-probability of each candidate within its list, -inf for padding.

        Args:
            history: leaves of the history, oldest first, padded on the right.
            leaf: leaves of the candidates, padded on the right.
        """
        position = torch.arange(history.shape[1], device=history.device)
        history_embedding = self.leaf(history) + self.position(position)
        tokens = self.drop(torch.cat([history_embedding, self.leaf(leaf) + self.rival], 1))
        padding = torch.cat([history, leaf], 1) == self.num_leaves
        # A row of padding alone would attend to nothing and give NaN; its output is not used.
        padding[:, 0] &= ~padding.all(1)
        state = self.blocks(tokens, src_key_padding_mask=padding)[:, history.shape[1] :]
        logit = self.worth(state).squeeze(2)
        return logit.masked_fill(leaf == self.num_leaves, float("-inf")).log_softmax(1)

    def recent(
        self, history: Int64[np.ndarray, " H"], start: Int[np.ndarray, " B1"]
    ) -> Int64[Tensor, "B S"]:
        """Return the leaves of the most recent training items of each history, padded."""
        leaf = self.leaf_of_item.numpy()[history]
        is_known = self.trained.numpy()[leaf]
        bounds = ragged.starts(
            np.bincount(ragged.row_of(start)[is_known], minlength=len(start) - 1)
        )
        recent_leaf, bounds = ragged.last(leaf[is_known], bounds, self.max_history)
        return torch.from_numpy(ragged.pad(recent_leaf, bounds, fill=self.num_leaves, width=1))

    def score(
        self,
        history: Int64[np.ndarray, " H"],
        history_start: Int[np.ndarray, " B1"],
        leaf: Int64[np.ndarray, " C"],
        start: Int[np.ndarray, " B1"],
    ) -> Float[Tensor, " C"]:
        """Compute the log-probability of each candidate among the known ones of its list.

        A leaf is known if it occurs in the training data. Unknown leaves get -inf, and so do all
        candidates of a history without a known leaf.
        """
        recent_leaves = self.recent(history, history_start)
        is_known = self.trained.numpy()[leaf]
        padded_leaf = torch.from_numpy(
            ragged.pad(
                np.where(is_known, leaf, self.num_leaves), start, fill=self.num_leaves, width=1
            )
        )
        logprob = self(recent_leaves, padded_leaf)[ragged.row_of(start), ragged.index_in_row(start)]
        no_history = (recent_leaves == self.num_leaves).all(1)[ragged.row_of(start)]
        return logprob.masked_fill(no_history | ~torch.from_numpy(is_known), float("-inf"))
