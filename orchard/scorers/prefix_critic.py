"""The prefix critic: what a prefix of codes promises after a history, without asking the policy.

A small network of its own reads the history and the codes so far. It says two things of the state:
V(s), the discounted step rewards from s on as `orchard.policy.value_head` has them, and how likely
each legal next code is. It needs none of the policy's hidden states, so that it can be trained
before there is a policy (`learner.critic`), and guides a search by any engine.

Codes have one embedding each, in histories and prefixes alike, so that the critic has an opinion of
items that it never met.

Shapes:  B histories   H items of them all   W items that are read of each   F prefixes   D width
         S states of each history
         A codes of the widest level, and one more that stands for the end of an item
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int64
from torch import Tensor, nn
from torch.nn import functional

from orchard import ragged
from orchard.catalog.catalog import Catalog
from orchard.catalog.trie import ROOT
from orchard.scorers import checkpoint
from orchard.scorers.encoder import encoder
from orchard.types import Prompts

KIND = "critic"

Values = Callable[[Int64[np.ndarray, " F"], Int64[Tensor, " F"]], Float32[np.ndarray, " F"]]
"""What the given trie nodes are worth to the prompts of the given numbers."""


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
        """A critic of the given sizes; it values every prefix at 0 before it has learnt."""
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
        """A of this catalog."""
        return max(self.catalog.level_size) + 1

    def table(
        self, history: Int64[np.ndarray, " H"], start: Int[np.ndarray, " B1"]
    ) -> Int64[np.ndarray, "B W"]:
        """Leaves of the most recent items of each history as trie nodes, -1 past the last."""
        recent, bounds = ragged.last(history, start, self.max_history)
        leaf = torch.from_numpy(self.catalog.leaf_of_item[recent])
        node = self.catalog.trie.node_of(leaf).numpy()
        return ragged.pad(node, bounds, fill=-1, width=self.max_history)

    def read(self, table: Int64[Tensor, "B W"]) -> Float[Tensor, "B D"]:
        """State of each history."""
        known = table >= 0
        # Position 0 is the reader's own, which sees an empty history too; 1 is the latest item's.
        since = known.sum(1, keepdim=True) - torch.arange(table.shape[1], device=table.device)
        item = self._embedded(table) + self.position(since.clamp(min=1))
        reader = self.position.weight[:1].expand(len(table), 1, -1)
        hidden = functional.pad(~known, (1, 0), value=False)
        return self.blocks(torch.cat([reader, item], 1), src_key_padding_mask=hidden)[:, 0]

    def evaluate(
        self, state: Float[Tensor, "*F D"], node: Int64[Tensor, "*F"]
    ) -> tuple[Float[Tensor, "*F"], Float[Tensor, "*F D"]]:
        """Value of each prefix after its history, and the query that meets its next codes."""
        prefix = self.prefix(self._embedded(node))
        seen = functional.silu(self.inner(torch.cat([state, prefix, state * prefix], -1)))
        return self.scalar(seen).squeeze(-1), self.choice(seen)

    def forward(
        self, table: Int64[Tensor, "B W"], node: Int64[Tensor, "B S"]
    ) -> tuple[Float[Tensor, "B S"], Float[Tensor, "B S A"]]:
        """Value of each state of each history, and logits of the actions there.

        The states of a history are whole walks, one node for each depth from 0 on and -1 past the
        end of an item. What is illegal in a state has a logit that no sum notices.
        """
        value, query = self.evaluate(self.read(table)[:, None].expand(-1, node.shape[1], -1), node)
        logit = query.new_full((*node.shape, self.num_actions), torch.finfo(query.dtype).min)
        period = len(self.level_start)
        for level, (start, end) in enumerate(
            zip(self.level_start[:-1], self.level_start[1:], strict=True)
        ):
            logit[:, level::period, : end - start] = (
                query[:, level::period] @ self.code.weight[start:end].T
            )
        logit[..., -1] = 0.0
        return value, logit.masked_fill(~self._legal(node), torch.finfo(query.dtype).min)

    def values(self, prompts: Prompts) -> Values:
        """What prefixes are worth to these prompts, each of which is read once, here."""
        with torch.inference_mode():
            table = torch.from_numpy(self.table(prompts.history, prompts.history_start))
            state = self.read(table)

        def of(
            prompt: Int64[np.ndarray, " F"], node: Int64[Tensor, " F"]
        ) -> Float32[np.ndarray, " F"]:
            with torch.inference_mode():
                return self.evaluate(state[torch.from_numpy(prompt)], node.cpu())[0].numpy()

        return of

    def _embedded(self, node: Int64[Tensor, "*F"]) -> Float[Tensor, "*F D"]:
        """Sum of the embeddings of the codes down to each node; 0 at the root and at -1."""
        trie, flat = self.catalog.trie, node.clamp(min=ROOT).flatten()
        path = trie.path(flat)
        start = torch.tensor(self.level_start[:-1], device=path.device)
        code = torch.where(path >= 0, trie.code[path.clamp(min=0)] + start, self.level_start[-1])
        return self.code(code).sum(1).unflatten(0, node.shape)

    def _legal(self, node: Int64[Tensor, "*F"]) -> Bool[Tensor, "*F A"]:
        """Codes that may follow each node; at leaves and past them, the end alone."""
        trie, flat = self.catalog.trie, node.flatten()
        children = trie.children(flat.clamp(min=ROOT))
        legal = torch.zeros(len(flat), self.num_actions, dtype=torch.bool, device=node.device)
        legal[children.owner, trie.code[children.node].long()] = True
        legal[flat < 0] = False
        legal[:, -1] = ~legal.any(1)
        return legal.unflatten(0, node.shape)


def load(folder: Path, catalog: Catalog) -> PrefixCritic:
    """The critic that `orchard fit critic` left in a folder.

    Raises:
        ConfigError: there is none.
        CatalogError: it was fitted for another catalog.
        CheckpointError: it is something else, or damaged.
    """
    sizes = checkpoint.sizes(folder, kind=KIND, catalog=catalog, section="")
    critic = PrefixCritic(catalog, **sizes)
    checkpoint.restore(critic, folder)
    return critic
