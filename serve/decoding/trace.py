"""What a search saw on its way to an answer: the prefixes it kept, the best it dropped.

Shapes:  F nodes of a frontier   M legal children   R prompts of a part
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from orchard.catalog.trie import ROOT, Trie
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.types import PolicyVersion, Prompts
from rollout.candidates import Candidates
from rollout.engine.payload import split_search
from rollout.engine.protocol import DecodingBackend, NextCodeLogprobs
from serve.catalog.store import CatalogVersion
from serve.schema import Node

PRUNED = 5
"""Dropped children shown of a prefix, the likeliest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """The legal children of one prefix."""

    node: int
    value: float | None
    child: Int64[np.ndarray, " M"]
    logprob: Float32[np.ndarray, " M"]


@dataclass(eq=False)
class Watched:
    """A search, how long its engine took, and what its engine gave it."""

    find: Callable[[DecodingBackend, Prompts], Candidates]
    trace: bool = False
    """Write down every expansion; the prompts of a traced search are one."""
    prefill_s: float = 0.0
    levels_s: float = 0.0
    """Time in forward passes after the first."""
    seen: list[Seen] = field(default_factory=list[Seen])

    def __call__(self, engine: DecodingBackend, prompts: Prompts) -> Candidates:
        """Search."""
        return self.find(_Recorder(engine, self), prompts)

    def part(
        self, rows: Int64[np.ndarray, " R"]
    ) -> Callable[[DecodingBackend, Prompts], Candidates]:
        """The search for some prompts of its batch, watched by the same."""
        find = split_search(self.find, rows)
        return lambda engine, prompts: find(_Recorder(engine, self), prompts)


class _Recorder:
    """Passes everything on to an engine and keeps what comes back."""

    def __init__(self, engine: DecodingBackend, watch: Watched) -> None:
        self._engine, self._watch = engine, watch

    @property
    def trie(self) -> Trie:
        """The engine's."""
        return self._engine.trie

    @property
    def tokenizer(self) -> ItemTokenizer:
        """The engine's."""
        return self._engine.tokenizer

    @property
    def version(self) -> PolicyVersion:
        """The engine's."""
        return self._engine.version

    def prefill(self, prompts: Prompts) -> NextCodeLogprobs:
        """As the engine does."""
        began = perf_counter()
        expansion = self._engine.prefill(prompts)
        self._watch.prefill_s += perf_counter() - began
        return self._keep(expansion, [ROOT] * len(prompts)) if self._watch.trace else expansion

    def extend(
        self,
        state: Int64[Tensor, " F"],
        token: Int64[Tensor, " S"],
        start: Int64[Tensor, " F1"],
        node: Int64[Tensor, " F"],
    ) -> NextCodeLogprobs:
        """As the engine does."""
        began = perf_counter()
        expansion = self._engine.extend(state, token, start, node)
        self._watch.levels_s += perf_counter() - began
        return self._keep(expansion, node.tolist()) if self._watch.trace else expansion

    def _keep(self, expansion: NextCodeLogprobs, node: list[int]) -> NextCodeLogprobs:
        start = expansion.children.start.tolist()
        child = expansion.children.node.cpu().numpy()
        logprob = expansion.logprob.float().cpu().numpy()
        value = expansion.value
        for at, one in enumerate(node):
            rows = slice(start[at], start[at + 1])
            # At the root, which no training reaches, a value means nothing.
            known = value is not None and one != ROOT
            self._watch.seen.append(
                Seen(
                    node=one,
                    value=float(value[at]) if value is not None and known else None,
                    child=child[rows],
                    logprob=logprob[rows],
                )
            )
        return expansion


def draw_tree(
    catalog_version: CatalogVersion, found: Candidates, seen: list[Seen], shown: list[int]
) -> list[Node]:
    """The nodes of one query's search, parents first.

    Args:
        catalog_version: the catalog that was searched.
        found: the candidates of the query.
        seen: what a traced search wrote down; without it the tree is that of the candidates.
        shown: the leaves that are in the answer.
    """
    trie, catalog = catalog_version.catalog.trie, catalog_version.catalog
    value = {one.node: one.value for one in seen}
    first = {
        int(leaf): int(catalog.item_id[catalog.item_of_leaf[catalog.leaf_start[leaf]]])
        for leaf in found.leaf
    }
    answered = np.isin(found.leaf, np.array(shown, dtype=np.int64))
    nodes: dict[int, Node] = {
        ROOT: Node(id=ROOT, parent=-1, code=-1, logprob=0.0, score=0.0, kept=True)
    }
    for row in np.argsort(~answered, kind="stable").tolist():
        above = ROOT
        for level, node in enumerate(found.node[row].tolist()):
            if node < 0:
                break
            if node not in nodes:
                logprob = float(found.logprob[row, level])
                last = level + 1 == found.node.shape[1] or found.node[row, level + 1] < 0
                nodes[node] = Node(
                    id=node, parent=above, code=int(trie.code[node]), logprob=logprob,
                    score=nodes[above].score + logprob, value=value.get(node),
                    kept=bool(answered[row]),
                    item_id=first[int(found.leaf[row])] if last else None,
                )  # fmt: skip
            above = node
    gain = {
        child: logprob
        for one in seen
        for child, logprob in zip(one.child.tolist(), one.logprob.tolist(), strict=True)
    }
    pruned = Counter(node.parent for node in nodes.values() if not node.kept)
    for one in sorted(seen, key=lambda one: one.node):
        if one.node not in nodes:
            for new in _hang_in(nodes, one.node, trie, gain, value):
                pruned[new.parent] += 1
        for at in np.argsort(-one.logprob, kind="stable"):
            child = int(one.child[at])
            if child in nodes:
                continue
            if pruned[one.node] >= PRUNED:
                break
            pruned[one.node] += 1
            logprob = float(one.logprob[at])
            nodes[child] = Node(
                id=child, parent=one.node, code=int(trie.code[child]), logprob=logprob,
                score=nodes[one.node].score + logprob, value=value.get(child), kept=False,
            )  # fmt: skip
    return list(nodes.values())


def _hang_in(
    nodes: dict[int, Node],
    node: int,
    trie: Trie,
    gain: Mapping[int, float],
    value: Mapping[int, float | None],
) -> list[Node]:
    """Add a prefix that was expanded and led to no candidate, with what is above it."""
    path, added = list[int](), list[Node]()
    while node not in nodes:
        path.append(node)
        node = int(trie.parent(torch.tensor([node])))
    for one in reversed(path):
        logprob = gain.get(one, 0.0)
        nodes[one] = Node(
            id=one, parent=node, code=int(trie.code[one]), logprob=logprob,
            score=nodes[node].score + logprob, value=value.get(one), kept=False,
        )  # fmt: skip
        added.append(nodes[one])
        node = one
    return added
