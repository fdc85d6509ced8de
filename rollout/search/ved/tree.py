"""Trees of a value-guided search: the visited nodes of all prompts, each evaluated once.

A node is a prefix that ends before a choice or at a leaf: forced codes belong to the node that they
lead to, so every node has several children or none. The tree's arrays are on the CPU, whatever the
engine's device.

Shapes:  B prompts   N nodes   M legal children of all nodes   F new nodes   C candidates
         D longest sequence   K free children
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64
from torch import Tensor

from orchard import ragged
from orchard.catalog.trie import ROOT
from orchard.errors import EngineError
from orchard.guide.values import Values
from orchard.types import Cost, Prompts
from rollout.engine.protocol import DecodingBackend, NextCodeLogprobs
from rollout.item_filter import PrefixMask
from rollout.search.beam import check_finite, spans


@dataclass(frozen=True, slots=True, kw_only=True)
class VedTree:
    """Tree nodes in the order of their visits, the roots first: node b is the root of prompt b."""

    prompt: Int64[np.ndarray, " N"]
    """Prompt of each node."""
    parent: Int64[np.ndarray, " N"]
    """Parent of each node; -1 at a root."""
    node: Int64[np.ndarray, " N"]
    """Trie node of each node."""
    depth: Int64[np.ndarray, " N"]
    """Number of codes of the prefix, including forced ones."""
    logprob: Float32[np.ndarray, " N"]
    """Log-probability of the choice at the parent."""
    score: Float32[np.ndarray, " N"]
    """Log-probability of the whole prefix given its prompt."""
    value: Float32[np.ndarray, " N"]
    """Value of the prefix, by the critic or the policy's value head."""
    entropy: Float32[np.ndarray, " N"]
    """Entropy of the choice at the node; 0 at a leaf."""
    state: Int64[np.ndarray, " N"]
    """Engine state of each node."""
    child_start: Int64[np.ndarray, " N1"]
    """Boundaries: the children of node n are the entries `child_start[n] : child_start[n + 1]`."""
    child: Int64[np.ndarray, " M"]
    """Trie node of each legal child."""
    child_logprob: Float32[np.ndarray, " M"]
    """Log-probability of each legal child."""
    taken: Bool[np.ndarray, " M"]
    """Whether the child has a node, is pending, or is excluded by the mask. Changed in place."""

    def __len__(self) -> int:
        return len(self.node)

    @property
    def is_leaf(self) -> Bool[np.ndarray, " N"]:
        """Whether each node has no children."""
        return np.diff(self.child_start) == 0

    def free_children(
        self, nodes: Int64[np.ndarray, " F"]
    ) -> tuple[Int64[np.ndarray, " K"], Int64[np.ndarray, " K"]]:
        """Return the entries of the free children of `nodes`, and the index of each in `nodes`."""
        count = np.diff(self.child_start)[nodes]
        entry = ragged.ranges(self.child_start[nodes], count)
        free = ~self.taken[entry]
        return entry[free], np.repeat(np.arange(len(nodes)), count)[free]

    def num_free(self) -> Int64[np.ndarray, " N"]:
        """Return the number of free (not taken) children of each node."""
        taken = ragged.starts(self.taken.astype(np.int64))[self.child_start]
        return np.diff(self.child_start) - np.diff(taken)

    def branches(
        self, end: Int64[np.ndarray, " C"], depth: int
    ) -> tuple[Float32[np.ndarray, "C D"], Float32[np.ndarray, "C D"]]:
        """Return log-probability and value (NaN if not computed) of each code on paths to `end`.

        Forced codes and entries past the end have log-probability 0. Walks up from `end` to the
        roots, one node per iteration.
        """
        logprob = np.zeros((len(end), depth), np.float32)
        value = np.full((len(end), depth), np.nan, np.float32)
        node, rows = end.copy(), np.arange(len(end))
        while True:
            inside = self.parent[node] >= 0
            if not inside.any():
                return logprob, value
            below, above = node[inside], self.parent[node[inside]]
            # The choice is the first code after the parent, the value is of the last code.
            logprob[rows[inside], self.depth[above]] = self.logprob[below]
            value[rows[inside], self.depth[below] - 1] = self.value[below]
            node = np.where(inside, self.parent[node], node)


def expand_roots(
    engine: DecodingBackend,
    prompts: Prompts,
    mask: PrefixMask | None = None,
    values: Values | None = None,
) -> tuple[VedTree, Cost]:
    """Make trees that contain only roots; children that the `mask` does not allow are taken.

    Values come from `values`, by default from the policy's own head.

    Raises:
        EngineError: a prompt does not fit the engine, the policy has diverged, or there are neither
            `values` nor a value head.
    """
    expansion = check_finite(engine, engine.prefill(prompts))
    prompt, root = np.arange(len(prompts)), np.full(len(prompts), ROOT)
    depth, zero = np.zeros(len(prompts), np.int64), np.zeros(len(prompts), np.float32)
    visited = VedTree(
        prompt=prompt, parent=depth - 1, node=root, depth=depth, logprob=zero, score=zero,
        **_expansion_fields(expansion, prompt, torch.from_numpy(root), mask, values),
    )  # fmt: skip
    return visited, Cost(prefill_tokens=len(prompts.token), passes=1)


def expand(
    engine: DecodingBackend,
    visited: VedTree,
    entry: Int64[np.ndarray, " F"],
    owner: Int64[np.ndarray, " F"],
    mask: PrefixMask | None = None,
    values: Values | None = None,
) -> tuple[VedTree, Cost]:
    """Evaluate chosen children, with the forced codes after them, in one forward pass.

    Args:
        engine: backend that has the states.
        visited: trees so far.
        entry: index of each chosen child among all children.
        owner: node that each chosen child is a child of.
        mask: mask of the children that may be visited; by default all.
        values: values of nodes; by default those of the policy's own head.

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
        **_expansion_fields(expansion, visited.prompt[owner], below, mask, values),
    )
    num_leaves = int(is_leaf.sum())
    return _join(visited, new), Cost(
        forward_tokens=len(token) - num_leaves, leaf_tokens=num_leaves, passes=1
    )


def _expansion_fields(
    expansion: NextCodeLogprobs,
    prompt: Int64[np.ndarray, " F"],
    node: Int64[Tensor, " F"],
    mask: PrefixMask | None,
    values: Values | None,
) -> dict[str, np.ndarray]:
    """Return the fields of `VedTree` that follow from an expansion: value, entropy, children."""
    if values is not None:
        value = values(prompt, node)
    elif expansion.value is not None:
        value = expansion.value.float().cpu().numpy()
    else:
        raise EngineError(
            "the search is guided by values, but the policy has no head for them; set "
            'model.value_head = true or rollout.ved.guide = "critic", or choose another '
            "rollout.search"
        )
    logprob = expansion.logprob.cpu().numpy()
    start = expansion.children.start.cpu().numpy()
    surprise: Float64[np.ndarray, " M"] = -np.exp(logprob.astype(np.float64)) * logprob
    owner = expansion.children.owner.cpu().numpy()
    taken = np.zeros(len(logprob), bool)
    if mask is not None:
        child = expansion.children.node
        taken = ~mask.allows(torch.from_numpy(prompt[owner]).to(child.device), child).cpu().numpy()
    return {
        "value": value,
        "entropy": np.bincount(owner, surprise, minlength=len(start) - 1).astype(np.float32),
        "state": expansion.state.cpu().numpy(),
        "child_start": start,
        "child": expansion.children.node.cpu().numpy(),
        "child_logprob": logprob,
        "taken": taken,
    }


def _join(first: VedTree, second: VedTree) -> VedTree:
    """Append the nodes and children of `second` to those of `first`."""
    start = np.concatenate([first.child_start, first.child_start[-1] + second.child_start[1:]])
    joined = {
        f.name: np.concatenate([getattr(first, f.name), getattr(second, f.name)])
        for f in fields(VedTree)
        if f.name != "child_start"
    }
    return replace(first, **joined, child_start=start)
