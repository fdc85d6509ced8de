"""Estimate the value of a prefix of codes after a history, without the policy.

A separate small network reads the history and the codes so far. For each state it predicts V(s),
the discounted sum of step rewards from s on as defined in `orchard.policy.value_head`, and the
probability of each legal next code. It needs no hidden states of the policy, so it can be trained
before there is a policy (`learner.critic`), and it can guide a search on any engine.

Each code has one embedding, in histories and prefixes alike, so the critic generalizes to items
outside its training data.

Shapes:  B histories   H items of all histories   W items read of each history   F prefixes
         D width   S states of each history
         A actions: the codes of the widest level, and the end of an item
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int64
from torch import Tensor, nn
from torch.nn import functional

from orchard import ragged
from orchard.catalog.catalog import Catalog
from orchard.catalog.trie import ROOT
from orchard.guide.values import Values
from orchard.scorers import checkpoint
from orchard.scorers.encoder import encoder
from orchard.types import Prompts

KIND = "critic"


class PrefixCritic(nn.Module):
    """A pre-norm encoder over the history's items, and an MLP over it and the prefix."""

    def __init__(
        self,
        catalog: Catalog,
        *,
        max_history: int,
        hidden_size: int,
        layers: int,
        heads: int,
        dropout: float = 0.0,
    ) -> None:
        """Initialize a critic of these sizes; before training it values every prefix at 0."""
        super().__init__()
        self.catalog, self.max_history = catalog, max_history
        self.level_start = tuple(ragged.starts(np.array(catalog.level_size)).tolist())
        self.code = nn.Embedding(self.level_start[-1] + 1, hidden_size, self.level_start[-1])
        self.position = nn.Embedding(max_history + 1, hidden_size)
        self.blocks = encoder(hidden_size, layers=layers, heads=heads, dropout=dropout)
        self.prefix = nn.Linear(hidden_size, hidden_size)
        self.inner = nn.Linear(3 * hidden_size, 2 * hidden_size)
        self.scalar = nn.Linear(2 * hidden_size, 1)
        self.choice = nn.Linear(2 * hidden_size, hidden_size)
        with torch.no_grad():
            for table in (self.code, self.position):
                table.weight.normal_(0.0, hidden_size**-0.5)
            self.code.weight[-1] = 0
        nn.init.zeros_(self.scalar.weight)
        nn.init.zeros_(self.scalar.bias)

    @property
    def num_actions(self) -> int:
        """Number of actions A of this catalog."""
        return max(self.catalog.level_size) + 1

    def table(
        self, history: Int64[np.ndarray, " H"], start: Int[np.ndarray, " B1"]
    ) -> Int64[np.ndarray, "B W"]:
        """Return the leaf nodes of the most recent items of each history, -1 past the last."""
        recent, bounds = ragged.last(history, start, self.max_history)
        leaf = torch.from_numpy(self.catalog.leaf_of_item[recent])
        node = self.catalog.trie.node_of(leaf).numpy()
        return ragged.pad(node, bounds, fill=-1, width=self.max_history)

    def read(self, table: Int64[Tensor, "B W"]) -> Float[Tensor, "B D"]:
        """Encode each history, one row of `table`, as a state."""
        is_item = table >= 0
        # Position 0 is a readout token, which also exists for an empty history; the latest item has
        # position 1.
        recency = is_item.sum(1, keepdim=True) - torch.arange(table.shape[1], device=table.device)
        items = self._embedded(table) + self.position(recency.clamp(min=1))
        readout = self.position.weight[:1].expand(len(table), 1, -1)
        is_padding = functional.pad(~is_item, (1, 0), value=False)
        return self.blocks(torch.cat([readout, items], 1), src_key_padding_mask=is_padding)[:, 0]

    def evaluate(
        self, state: Float[Tensor, "*F D"], node: Int64[Tensor, "*F"]
    ) -> tuple[Float[Tensor, "*F"], Float[Tensor, "*F D"]]:
        """Return the value of each prefix after its history, and the query for its next codes."""
        prefix = self.prefix(self._embedded(node))
        features = functional.silu(self.inner(torch.cat([state, prefix, state * prefix], -1)))
        return self.scalar(features).squeeze(-1), self.choice(features)

    def forward(
        self, table: Int64[Tensor, "B W"], node: Int64[Tensor, "B S"]
    ) -> tuple[Float[Tensor, "B S"], Float[Tensor, "B S A"]]:
        """Return the value of each state of each history, and the logits of its actions.

        The states of a history are complete walks, with one node for each depth from 0 on and -1
        past the end of an item. Illegal actions have the lowest finite logit.
        """
        value, query = self.evaluate(self.read(table)[:, None].expand(-1, node.shape[1], -1), node)
        logit = query.new_full((*node.shape, self.num_actions), torch.finfo(query.dtype).min)
        period = len(self.level_start)
        for level, (start, end) in enumerate(
            zip(self.level_start[:-1], self.level_start[1:], strict=True)
        ):
            # states of this depth in all walks, against the embeddings of the level's codes
            logit[:, level::period, : end - start] = (
                query[:, level::period] @ self.code.weight[start:end].T
            )
        logit[..., -1] = 0.0
        return value, logit.masked_fill(~self._legal(node), torch.finfo(query.dtype).min)

    def values(self, prompts: Prompts) -> Values:
        """Encode the prompts' histories and return a function that evaluates prefixes of them."""
        with torch.inference_mode():
            table = torch.from_numpy(self.table(prompts.history, prompts.history_start))
            state = self.read(table)

        def evaluate(
            prompt: Int64[np.ndarray, " F"], node: Int64[Tensor, " F"]
        ) -> Float32[np.ndarray, " F"]:
            with torch.inference_mode():
                return self.evaluate(state[torch.from_numpy(prompt)], node.cpu())[0].numpy()

        return evaluate

    def _embedded(self, node: Int64[Tensor, "*F"]) -> Float[Tensor, "*F D"]:
        """Sum the embeddings of the codes down to each node; 0 at the root and at -1."""
        trie, flat = self.catalog.trie, node.clamp(min=ROOT).flatten()
        path = trie.path(flat)
        start = torch.tensor(self.level_start[:-1], device=path.device)
        # row of each code in the embedding table; the padding row past the end of a path
        code = torch.where(path >= 0, trie.code[path.clamp(min=0)] + start, self.level_start[-1])
        return self.code(code).sum(1).unflatten(0, node.shape)

    def _legal(self, node: Int64[Tensor, "*F"]) -> Bool[Tensor, "*F A"]:
        """Return a mask of the codes that may follow each node; from leaves on, only the end."""
        trie, flat = self.catalog.trie, node.flatten()
        children = trie.children(flat.clamp(min=ROOT))
        legal = torch.zeros(len(flat), self.num_actions, dtype=torch.bool, device=node.device)
        legal[children.owner, trie.code[children.node].long()] = True
        legal[flat < 0] = False
        legal[:, -1] = ~legal.any(1)
        return legal.unflatten(0, node.shape)


def load(folder: Path, catalog: Catalog) -> PrefixCritic:
    """Load the critic that `orchard fit critic` wrote to a folder.

    Raises:
        ConfigError: the folder has no critic.
        CatalogError: the critic was fitted for another catalog.
        CheckpointError: the model is of another kind, or damaged.
    """
    make = partial(PrefixCritic, catalog)
    return checkpoint.load(make, folder, kind=KIND, catalog=catalog, section="")
