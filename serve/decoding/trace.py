"""Tracing of a search: timings, and a tree of kept prefixes with the best pruned ones.

Shapes:  F nodes of a frontier   M legal children   R prompts of a split
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from orchard.catalog.trie import ROOT, Trie
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.types import PolicyVersion, Prompts
from rollout.candidates import Candidates
from rollout.engine.protocol import DecodingBackend, NextCodeLogprobs
from serve.catalog.store import CatalogVersion
from serve.schema import Node

PRUNED = 5
"""Maximum number of pruned children shown per prefix, the likeliest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedStep:
    """Expansion of one prefix: its legal children and their log-probabilities."""

    node: int
    value: float | None
    child: Int64[np.ndarray, " M"]
    logprob: Float32[np.ndarray, " M"]


@dataclass(eq=False)
class Trace:
    """Record of a search: its time in the engine and, on request, every expansion."""

    record_steps: bool = False
    """Whether to record every expansion; the search then has a single prompt."""
    prefill_s: float = 0.0
    levels_s: float = 0.0
    """Seconds in forward passes after the first."""
    steps: list[TracedStep] = field(default_factory=list[TracedStep])

    def of(self, search_fn: partial[Candidates]) -> partial[Candidates]:
        """Return the search, recorded here; it keeps its keywords, and is split by them."""
        return partial(_traced, self, search_fn.func, **search_fn.keywords)


def _traced(
    trace: Trace,
    search_fn: Callable[..., Candidates],
    engine: DecodingBackend,
    prompts: Prompts,
    **arguments: object,
) -> Candidates:
    return search_fn(_RecordingBackend(engine, trace), prompts, **arguments)


class _RecordingBackend:
    """Decoding backend that forwards to an engine and records its expansions."""

    def __init__(self, engine: DecodingBackend, trace: Trace) -> None:
        self._engine, self._trace = engine, trace

    @property
    def trie(self) -> Trie:
        """Trie of the engine."""
        return self._engine.trie

    @property
    def tokenizer(self) -> ItemTokenizer:
        """Item tokenizer of the engine."""
        return self._engine.tokenizer

    @property
    def version(self) -> PolicyVersion:
        """Policy version of the engine."""
        return self._engine.version

    def prefill(self, prompts: Prompts) -> NextCodeLogprobs:
        """Prefill in the engine and record the time and the expansions."""
        start_time = perf_counter()
        expansion = self._engine.prefill(prompts)
        self._trace.prefill_s += perf_counter() - start_time
        if self._trace.record_steps:
            self._record(expansion, [ROOT] * len(prompts))
        return expansion

    def extend(
        self,
        state: Int64[Tensor, " F"],
        token: Int64[Tensor, " S"],
        start: Int64[Tensor, " F1"],
        node: Int64[Tensor, " F"],
    ) -> NextCodeLogprobs:
        """Extend in the engine and record the time and the expansions."""
        start_time = perf_counter()
        expansion = self._engine.extend(state, token, start, node)
        self._trace.levels_s += perf_counter() - start_time
        if self._trace.record_steps:
            self._record(expansion, node.tolist())
        return expansion

    def _record(self, expansion: NextCodeLogprobs, nodes: list[int]) -> None:
        """Append one step per node of the expansion."""
        # Children of frontier node f are at start[f] : start[f + 1] of `child` and `logprob`.
        start = expansion.children.start.tolist()
        child = expansion.children.node.cpu().numpy()
        logprob = expansion.logprob.float().cpu().numpy()
        value = expansion.value
        for node_index, node in enumerate(nodes):
            children = slice(start[node_index], start[node_index + 1])
            # The value head is not trained at the root, so its value there is meaningless.
            has_value = value is not None and node != ROOT
            self._trace.steps.append(
                TracedStep(
                    node=node,
                    value=float(value[node_index]) if value is not None and has_value else None,
                    child=child[children],
                    logprob=logprob[children],
                )
            )


def draw_tree(
    catalog_version: CatalogVersion,
    candidates: Candidates,
    steps: list[TracedStep],
    shown: list[int],
) -> list[Node]:
    """Return the nodes of one query's search tree, parents before children.

    Args:
        catalog_version: catalog version that was searched.
        candidates: candidates of the query.
        steps: recorded expansions; if empty, the tree holds only the candidates' prefixes.
        shown: leaves of the returned items.
    """
    trie, catalog = catalog_version.catalog.trie, catalog_version.catalog
    value_of = {step.node: step.value for step in steps}
    # First item of each candidate leaf.
    item_of = {
        int(leaf): int(catalog.item_id[catalog.item_of_leaf[catalog.leaf_start[leaf]]])
        for leaf in candidates.leaf
    }
    # Whether each candidate's leaf is in the answer.
    is_shown = np.isin(candidates.leaf, np.array(shown, dtype=np.int64))
    nodes: dict[int, Node] = {
        ROOT: Node(id=ROOT, parent=-1, code=-1, logprob=0.0, score=0.0, kept=True)
    }
    # Shown candidates first, so that a prefix they share with others counts as kept.
    for row in np.argsort(~is_shown, kind="stable").tolist():
        parent = ROOT
        # Node of the candidate at each depth, negative past its end.
        for level, node in enumerate(candidates.node[row].tolist()):
            if node < 0:
                break
            if node not in nodes:
                logprob = float(candidates.logprob[row, level])
                is_leaf = (
                    level + 1 == candidates.node.shape[1] or candidates.node[row, level + 1] < 0
                )
                nodes[node] = Node(
                    id=node, parent=parent, code=int(trie.code[node]), logprob=logprob,
                    score=nodes[parent].score + logprob, value=value_of.get(node),
                    kept=bool(is_shown[row]),
                    item_id=item_of[int(candidates.leaf[row])] if is_leaf else None,
                )  # fmt: skip
            parent = node
    logprob_of = {
        child: logprob
        for step in steps
        for child, logprob in zip(step.child.tolist(), step.logprob.tolist(), strict=True)
    }
    # Number of pruned children drawn below each node.
    num_pruned = Counter(node.parent for node in nodes.values() if not node.kept)
    for step in sorted(steps, key=lambda step: step.node):
        if step.node not in nodes:
            for added in _add_pruned_path(nodes, step.node, trie, logprob_of, value_of):
                num_pruned[added.parent] += 1
        for child_index in np.argsort(-step.logprob, kind="stable"):
            child = int(step.child[child_index])
            if child in nodes:
                continue
            if num_pruned[step.node] >= PRUNED:
                break
            num_pruned[step.node] += 1
            logprob = float(step.logprob[child_index])
            nodes[child] = Node(
                id=child, parent=step.node, code=int(trie.code[child]), logprob=logprob,
                score=nodes[step.node].score + logprob, value=value_of.get(child), kept=False,
            )  # fmt: skip
    return list(nodes.values())


def _add_pruned_path(
    nodes: dict[int, Node],
    node: int,
    trie: Trie,
    logprob_of: Mapping[int, float],
    value_of: Mapping[int, float | None],
) -> list[Node]:
    """Add a pruned prefix and its missing ancestors to the tree; return the added nodes."""
    # From the prefix up to its first ancestor in the tree, exclusive.
    path, added = list[int](), list[Node]()
    while node not in nodes:
        path.append(node)
        node = int(trie.parent(torch.tensor([node])))
    parent = node
    for child in reversed(path):
        logprob = logprob_of.get(child, 0.0)
        nodes[child] = Node(
            id=child, parent=parent, code=int(trie.code[child]), logprob=logprob,
            score=nodes[parent].score + logprob, value=value_of.get(child), kept=False,
        )  # fmt: skip
        added.append(nodes[child])
        parent = child
    return added
