"""Guided search against a plain search of one prompt at a time."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from orchard.settings import VedConfig
from orchard.testing import TinySetup
from rollout.engine.protocol import NextCodeLogprobs
from rollout.engine.torch import TorchEngine
from rollout.search.draws import uniforms
from rollout.search.ved.search import TRAVERSALS_PER_TOKEN, ved
from tests.fixtures.values import leaf_values


@dataclass(eq=False)
class Node:
    """A visited prefix of the plain search below."""

    trie: int
    depth: int
    score: float
    parent: "Node | None"
    logprob: float = 0.0
    priority: float = 0.0
    value: float = 0.0
    state: torch.Tensor = field(default_factory=lambda: torch.zeros(1).long())
    free: dict[int, float] = field(default_factory=dict[int, float])
    grown: "list[Node]" = field(default_factory=list["Node"])
    visits: int = 0


class Plain:
    """The algorithm for one prompt, one node at a time, by the book."""

    def __init__(self, engine: TorchEngine, world: TinySetup, row: int, config: VedConfig) -> None:
        self.engine, self.config, self.trie = engine, config, engine.trie
        prompt = world.prompts.select(np.array([row]))
        self.uniform = uniforms(
            prompt.id, TRAVERSALS_PER_TOKEN * config.budget, self.trie.depth**2, 1
        )
        self.spent, self.root = 1, Node(trie=0, depth=0, score=0.0, parent=None)
        self.nodes = [self.root]
        self.read(self.root, engine.prefill(prompt))

    def read(self, node: Node, expansion: NextCodeLogprobs) -> None:
        assert expansion.value is not None
        logprob = expansion.logprob.tolist()
        node.free = dict(zip(expansion.children.node.tolist(), logprob, strict=True))
        entropy = -sum(np.exp(one) * one for one in logprob)
        node.value, node.state = float(expansion.value), expansion.state
        node.priority = self.config.value_weight * node.value + self.config.entropy_weight * entropy

    def visit(self, parent: Node, child: int) -> Node:
        below = int(self.trie.descend(torch.tensor([child])))
        depth = int(self.trie.depth_of(torch.tensor([below])))
        leaf = int(self.trie.num_children(torch.tensor([below]))) == 0
        self.spent += depth - parent.depth - leaf
        logprob = parent.free.pop(child)
        node = Node(trie=below, depth=depth, score=parent.score + logprob, parent=parent)
        node.logprob = logprob
        path = self.trie.path(torch.tensor([below]))[0, parent.depth : depth]
        token = self.engine.tokenizer.token_of(path)
        start = torch.tensor([0, len(token)])
        self.read(node, self.engine.extend(parent.state, token, start, torch.tensor([below])))
        parent.grown.append(node)
        self.nodes.append(node)
        return node

    def begin(self) -> None:
        """Children with forced codes stay unread (their code is kept) until they are through."""
        beams = [(0.0, 0, self.root, 0)]
        for step in range(1, self.trie.depth + 1):
            entries: list[tuple[float, int, Node, int]] = []
            for score, place, node, child in beams:
                if child or not node.free:
                    entries.append((score, place, node, child))
                else:
                    entries += [(node.score + lp, c, node, c) for c, lp in node.free.items()]
            beams = []
            for score, place, node, child in sorted(entries, key=lambda e: (-e[0], e[1]))[
                : self.config.width
            ]:
                below = self.trie.descend(torch.tensor([child]))
                if child and int(self.trie.depth_of(below)) == step:
                    new = self.visit(node, child)
                    beams.append((score, new.trie, new, 0))
                else:
                    beams.append((score, place, node, child))

    def traverse(self, number: int) -> None:
        path = [self.root]
        while path[-1].grown:
            wonder = np.log(number + 1)
            path.append(
                max(
                    path[-1].grown,
                    key=lambda n: (
                        n.priority + self.config.exploration * np.sqrt(wonder / (n.visits + 1))
                    ),
                )
            )
        mean = {
            node.depth: np.mean([n.priority for n in self.nodes if n.depth == node.depth])
            for node in path
        }
        for node in path:
            node.visits += 1
        cost = 0
        chosen: list[tuple[Node, int]] = []
        for level, node in enumerate(path):
            if not node.free or node.priority < mean[node.depth] - 1e-9:
                continue
            weight = np.exp(list(node.free.values()))
            number_drawn = float(self.uniform[number, level * self.trie.depth])
            edge = np.cumsum(weight) / weight.sum()
            child = list(node.free)[int(np.searchsorted(edge, number_drawn, side="right"))]
            below = self.trie.descend(torch.tensor([child]))
            cost += int(self.trie.depth_of(below)) - node.depth
            cost -= int(self.trie.num_children(below) == 0)
            if self.spent + cost <= self.config.budget:
                chosen.append((node, child))
        for node, child in chosen:
            self.visit(node, child)

    def run(self) -> list[int]:
        """All leaves visited."""
        self.begin()
        number = 0
        while self.spent < self.config.budget and any(n.free for n in self.nodes):
            if number == TRAVERSALS_PER_TOKEN * self.config.budget:
                break
            self.traverse(number)
            number += 1
        ends = [n.trie for n in self.nodes if not n.free and not n.grown]
        return sorted(self.trie.leaf(torch.tensor(ends)).tolist())


@pytest.mark.slow
@pytest.mark.parametrize(
    "choice",
    [
        {"exploration": 0.0},
        {"exploration": 1.0},
        {"value_weight": 0.0},
        {"entropy_weight": 0.0, "exploration": 0.0},
        {"value_weight": 0.3, "entropy_weight": 2.0},
    ],
)
@pytest.mark.parametrize("budget", [17, 33])
def test_it_visits_what_a_plain_search_of_one_prompt_at_a_time_visits(
    wide: TinySetup, engine: TorchEngine, choice: dict[str, float], budget: int
) -> None:
    config = VedConfig.model_validate({"budget": budget, "width": 4} | choice)
    found = ved(engine, wide.prompts, config, count=1000, seed=1)
    for row in range(len(wide.prompts)):
        values = leaf_values(found, row)
        visited = sorted(leaf for leaf, one in values.items() if not np.isnan(one))
        plain = Plain(engine, wide, row, config)
        assert visited == plain.run()
    total = sum(len(leaf_values(found, row)) for row in range(len(wide.prompts)))
    assert found.cost.counts["completed"] < total
