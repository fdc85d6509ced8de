"""What a guided search has visited: the nodes of many prompts' trees, each evaluated once.

A node is a prefix that ends before a choice or at a leaf: forced codes belong to the node that they
lead to, so every node has several children or none. The books are kept on the CPU, whatever device
the engine computes on.

Shapes:  B prompts   N nodes   M legal children of all nodes   F new nodes   C candidates
         D longest sequence
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64
from torch import Tensor

from orchard import ragged
from orchard.catalog.trie import ROOT
from orchard.errors import EngineError
from orchard.scorers.prefix_critic import Values
from orchard.types import Cost, Prompts
from rollout.engine.protocol import DecodingBackend, NextCodeLogprobs
from rollout.item_filter import PrefixMask
from rollout.search.beam import check_finite, spans


@dataclass(frozen=True, slots=True, kw_only=True)
class VedTree:
    """Nodes in the order in which they were visited, the roots first: node b is prompt b itself."""

    prompt: Int64[np.ndarray, " N"]
    parent: Int64[np.ndarray, " N"]
    """-1 at a root."""
    node: Int64[np.ndarray, " N"]
    """In the trie."""
    depth: Int64[np.ndarray, " N"]
    """Codes so far, forced ones included."""
    logprob: Float32[np.ndarray, " N"]
    """Of the choice at the parent."""
    score: Float32[np.ndarray, " N"]
    """Log-probability of the whole prefix given its prompt."""
    value: Float32[np.ndarray, " N"]
    entropy: Float32[np.ndarray, " N"]
    """Of the choice at the node; 0 at a leaf."""
    state: Int64[np.ndarray, " N"]
    """Of the engine."""
    child_start: Int64[np.ndarray, " N1"]
    """Children of node n are the entries `child_start[n] : child_start[n + 1]` of the next two."""
    child: Int64[np.ndarray, " M"]
    """Trie node of each legal child."""
    child_logprob: Float32[np.ndarray, " M"]
    taken: Bool[np.ndarray, " M"]
    """The child has a node, is to get one, or must not have one. Changes in place."""

    def __len__(self) -> int:
        return len(self.node)

    @property
    def is_leaf(self) -> Bool[np.ndarray, " N"]:
        """The nodes without children."""
        return np.diff(self.child_start) == 0

    def free_children(
        self, nodes: Int64[np.ndarray, " F"]
    ) -> tuple[Int64[np.ndarray, " K"], Int64[np.ndarray, " K"]]:
        """Entries of the children not taken of the given nodes, and the index of their owner."""
        count = np.diff(self.child_start)[nodes]
        entry = ragged.ranges(self.child_start[nodes], count)
        free = ~self.taken[entry]
        return entry[free], np.repeat(np.arange(len(nodes)), count)[free]

    def num_free(self) -> Int64[np.ndarray, " N"]:
        """Number of children of each node that are not taken."""
        taken = ragged.starts(self.taken.astype(np.int64))[self.child_start]
        return np.diff(self.child_start) - np.diff(taken)

    def branches(
        self, end: Int64[np.ndarray, " C"], depth: int
    ) -> tuple[Float32[np.ndarray, "C D"], Float32[np.ndarray, "C D"]]:
        """Log-probability of each code down to the given nodes, and value after it (NaN: unknown).

        Forced codes and what lies past the end have log-probability 0.
        """
        logprob = np.zeros((len(end), depth), np.float32)
        value = np.full((len(end), depth), np.nan, np.float32)
        node, rows = end.copy(), np.arange(len(end))
        while True:
            inside = self.parent[node] >= 0
            if not inside.any():
                return logprob, value
            at, above = node[inside], self.parent[node[inside]]
            logprob[rows[inside], self.depth[above]] = self.logprob[at]
            value[rows[inside], self.depth[at] - 1] = self.value[at]
            node = np.where(inside, self.parent[node], node)


def expand_roots(
    engine: DecodingBackend,
    prompts: Prompts,
    entry: PrefixMask | None = None,
    values: Values | None = None,
) -> tuple[VedTree, Cost]:
    """The trees of nothing but their prompts; children that `entry` does not admit are taken.

    Nodes are worth what `values` has them, by default what the policy's own head has.

    Raises:
        EngineError: a prompt does not fit the engine, the policy has diverged, or there is neither
            `values` nor a value head to guide by.
    """
    expansion = check_finite(engine, engine.prefill(prompts))
    number, root = np.arange(len(prompts)), np.full(len(prompts), ROOT)
    nothing, zero = np.zeros(len(prompts), np.int64), np.zeros(len(prompts), np.float32)
    visited = VedTree(
        prompt=number, parent=nothing - 1, node=root, depth=nothing, logprob=zero, score=zero,
        **_evaluated(expansion, number, torch.from_numpy(root), entry, values),
    )  # fmt: skip
    return visited, Cost(prefill_tokens=len(prompts.token), passes=1)


def expand(
    engine: DecodingBackend,
    visited: VedTree,
    entry: Int64[np.ndarray, " F"],
    owner: Int64[np.ndarray, " F"],
    gate: PrefixMask | None = None,
    values: Values | None = None,
) -> tuple[VedTree, Cost]:
    """Evaluate chosen children in one forward pass; their forced codes go with them.

    Args:
        engine: that holds the states.
        visited: the trees so far.
        entry: place of each chosen child among all children.
        owner: node that it is a child of.
        gate: which of the new nodes' children may be visited; by default all.
        values: what nodes are worth; by default what the policy's own head says.

    Raises:
        EngineError: the policy has diverged.
    """
    trie = engine.trie
    above = torch.from_numpy(visited.node[owner]).to(trie.code.device)
    below = trie.descend(torch.from_numpy(visited.child[entry]).to(above.device))
    token, start = spans(engine, above, below)
    state = torch.from_numpy(visited.state[owner]).to(above.device)
    expansion = check_finite(engine, engine.extend(state, token, start, below))
    logprob = visited.child_logprob[entry]
    is_leaf = (trie.num_children(below) == 0).cpu().numpy()
    visited.taken[entry] = True
    new = VedTree(
        prompt=visited.prompt[owner],
        parent=owner,
        node=below.cpu().numpy(),
        depth=trie.depth_of(below).cpu().numpy(),
        logprob=logprob,
        score=visited.score[owner] + logprob,
        **_evaluated(expansion, visited.prompt[owner], below, gate, values),
    )
    leaves = int(is_leaf.sum())
    return _join(visited, new), Cost(
        forward_tokens=len(token) - leaves, leaf_tokens=leaves, passes=1
    )


def _evaluated(
    expansion: NextCodeLogprobs,
    prompt: Int64[np.ndarray, " F"],
    node: Int64[Tensor, " F"],
    gate: PrefixMask | None,
    values: Values | None,
) -> dict[str, np.ndarray]:
    """The fields that an expansion of nodes of the given prompts knows."""
    if values is not None:
        value = values(prompt, node)
    elif expansion.value is not None:
        value = expansion.value.float().cpu().numpy()
    else:
        raise EngineError(
            "the search is to be guided by values, but the policy has no head for them; set "
            'model.value_head = true or rollout.ved.guide = "critic", or choose another '
            "rollout.search"
        )
    logprob = expansion.logprob.cpu().numpy()
    start = expansion.children.start.cpu().numpy()
    surprise: Float64[np.ndarray, " M"] = -np.exp(logprob.astype(np.float64)) * logprob
    owner = expansion.children.owner.cpu().numpy()
    taken = np.zeros(len(logprob), bool)
    if gate is not None:
        child = expansion.children.node
        taken = ~gate.allows(torch.from_numpy(prompt[owner]).to(child.device), child).cpu().numpy()
    return {
        "value": value,
        "entropy": np.bincount(owner, surprise, minlength=len(start) - 1).astype(np.float32),
        "state": expansion.state.cpu().numpy(),
        "child_start": start,
        "child": expansion.children.node.cpu().numpy(),
        "child_logprob": logprob,
        "taken": taken,
    }


def _join(one: VedTree, other: VedTree) -> VedTree:
    """The nodes of both, the children of the second behind those of the first."""
    start = np.concatenate([one.child_start, one.child_start[-1] + other.child_start[1:]])
    both = {
        f.name: np.concatenate([getattr(one, f.name), getattr(other, f.name)])
        for f in fields(VedTree)
        if f.name != "child_start"
    }
    return replace(one, **both, child_start=start)
