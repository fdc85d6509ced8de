"""Value-guided decoding: its budget, its parts one by one, and a plain version of the whole."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchard.errors import ConfigError, EngineError
from orchard.policy import value_head
from orchard.settings import VedConfig
from orchard.testing import TinySetup, tiny_setup
from rollout.engine.protocol import NextCodeLogprobs
from rollout.engine.torch import TorchEngine
from rollout.search.beam import Candidates, beam, uniforms
from rollout.search.ved.search import TRAVERSALS_PER_TOKEN, ved
from rollout.search_trees import build_search_trees
from tests.fixtures.guides import random_guide


def guided(world: TinySetup, *, seed: int = 0, scale: float = 0.3) -> TorchEngine:
    """An engine whose policy has a value head with something to say."""
    value_head.attach(world.model, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    for parameter in world.model.get_submodule(value_head.NAME).parameters():
        parameter.data.normal_(0.0, scale, generator=draw)
    return TorchEngine(world.model, world.tokenizer, world.version)


@pytest.fixture(scope="session")
def wide() -> TinySetup:
    """A world in which a narrow beam leaves much to be found."""
    return tiny_setup(level_size=(6, 5, 6), num_items=90, lengths=(0, 3, 1, 7, 2))


@pytest.fixture(scope="session")
def engine(wide: TinySetup) -> TorchEngine:
    return guided(wide)


def leaves(found: Candidates) -> list[list[int]]:
    return [part.tolist() for part in np.split(found.leaf, found.start[1:-1])]


def leaf_values(found: Candidates, row: int) -> dict[int, float]:
    """The value of each candidate of a prompt, NaN where it was never evaluated."""
    assert found.value is not None
    part = found.select(np.array([row]))
    assert part.value is not None
    length = (part.node >= 0).sum(1)
    return dict(zip(part.leaf.tolist(), part.value[range(len(length)), length - 1], strict=True))


@pytest.mark.slow
@settings(max_examples=50)
@given(
    extra=st.integers(0, 25),
    choice=st.fixed_dictionaries(
        {
            "width": st.integers(1, 4),
            "exploration": st.sampled_from([0.0, 1.0, 5.0]),
            "expand_root": st.booleans(),
            "warm_visits": st.booleans(),
            "to_leaf": st.booleans(),
            "count_leaves": st.booleans(),
            "traversals": st.integers(1, 4),
        }
    ),
    shape=st.tuples(*[st.integers(1, 5)] * 3),
    seed=st.integers(0, 2**16),
    varying=st.booleans(),
)
def test_no_prompt_ever_costs_more_than_its_budget(
    extra: int, choice: dict[str, int], shape: tuple[int, int, int], seed: int, varying: bool
) -> None:
    world = tiny_setup(
        seed=seed, level_size=shape, num_items=40, varying_depth=varying, lengths=(1, 4)
    )
    engine, depth = guided(world, seed=seed), world.catalog.trie.depth
    least = 1 + choice["width"] * (depth if choice["count_leaves"] else depth - 1)
    config = VedConfig.model_validate({**choice, "budget": least + extra})
    every = beam(engine, world.prompts, width=100)
    for row in range(len(world.prompts)):
        alone = np.array([row])
        found = ved(engine, world.prompts.select(alone), config, count=6, seed=1)
        counted = found.cost.forward_tokens + choice["count_leaves"] * found.cost.leaf_tokens
        assert 1 + counted <= config.budget
        assert len(set(found.leaf.tolist())) == len(found.leaf) <= 6
        known = every.select(alone)
        place = known.leaf.argsort()[found.leaf]
        np.testing.assert_allclose(found.logprob, known.logprob[place], atol=1e-4)
        np.testing.assert_allclose(found.score, known.score[place], atol=1e-4)
        assert np.array_equal(found.node, known.node[place])
        assert (np.diff(found.score) <= 0).all()


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


def test_the_tree_holds_the_beam_that_it_began_with(wide: TinySetup, engine: TorchEngine) -> None:
    found = ved(engine, wide.prompts, VedConfig(budget=9, width=4), count=1000, seed=0)
    likeliest = beam(engine, wide.prompts, width=4)
    for row, group in enumerate(leaves(likeliest)):
        values = leaf_values(found, row)
        assert not np.isnan([values[leaf] for leaf in group]).any()


def test_selection_and_gate_both_act_within_the_budget_of_a_beam_of_sixteen(
    wide: TinySetup, engine: TorchEngine
) -> None:
    found = ved(engine, wide.prompts, VedConfig(), count=16, seed=0)
    counts, num_prompts = found.cost.counts, len(wide.prompts)
    assert found.cost.forward_tokens <= 32 * num_prompts
    assert counts["traversals"] >= num_prompts
    assert counts["overruled"] > 0
    assert counts["refused"] > 0
    assert counts["expanded_2"] > 0
    open_root, closed_root = (
        ved(engine, wide.prompts, VedConfig(width=2, expand_root=on), count=16, seed=0).cost
        for on in (True, False)
    )
    assert open_root.counts["expanded_1"] > 0
    assert closed_root.counts["expanded_1"] == 0


def test_the_leaves_of_the_highest_value_are_chosen(wide: TinySetup, engine: TorchEngine) -> None:
    few, all_ = (ved(engine, wide.prompts, VedConfig(), count=n, seed=0) for n in (4, 1000))
    for row, group in enumerate(leaves(few)):
        known = {leaf: one for leaf, one in leaf_values(all_, row).items() if not np.isnan(one)}
        assert set(group) == set(sorted(known, key=lambda leaf: -known[leaf])[:4])


def test_known_distributions_complete_a_group_without_a_forward_pass(
    wide: TinySetup, engine: TorchEngine
) -> None:
    config = VedConfig(budget=9, width=4)
    four, many = (ved(engine, wide.prompts, config, count=n, seed=0) for n in (4, 16))
    assert many.cost.forward_tokens == four.cost.forward_tokens
    assert many.cost.passes == four.cost.passes
    assert four.cost.counts["completed"] == 0
    unknown = [np.isnan(list(leaf_values(many, row).values())) for row in range(5)]
    assert many.cost.counts["completed"] == np.concatenate(unknown).sum() > 0


def test_several_traversals_share_a_pass(wide: TinySetup, engine: TorchEngine) -> None:
    one, four = (
        ved(engine, wide.prompts, VedConfig(traversals=n), count=16, seed=0).cost for n in (1, 4)
    )
    assert four.passes < 0.6 * one.passes
    assert four.forward_tokens > 0.8 * one.forward_tokens


def test_the_nodes_of_the_trees_carry_their_values(wide: TinySetup, engine: TorchEngine) -> None:
    found = ved(engine, wide.prompts, VedConfig(), count=8, seed=0)
    trees = build_search_trees(wide.prompts, found, wide.tokenizer, wide.version)
    assert trees.value is not None
    assert found.value is not None
    path = trees.paths()
    np.testing.assert_array_equal(trees.value[path], found.value)
    assert np.isnan(trees.value[trees.step == 0]).all()


def test_a_budget_below_the_beam_and_a_policy_without_values_are_refused(
    wide: TinySetup, engine: TorchEngine
) -> None:
    with pytest.raises(ConfigError, match="budget = 16 cannot cover depth 3 with beam 8"):
        ved(engine, wide.prompts, VedConfig(budget=16), count=8, seed=0)
    with pytest.raises(ConfigError, match="raise it to at least 25"):
        ved(engine, wide.prompts, VedConfig(budget=24, count_leaves=True), count=8, seed=0)
    plain = tiny_setup()
    blind = TorchEngine(plain.model, plain.tokenizer, plain.version)
    with pytest.raises(EngineError, match=r"set model\.value_head = true"):
        ved(blind, plain.prompts, VedConfig(), count=8, seed=0)


@pytest.mark.parametrize("likelihood", [False, True])
def test_experts_may_give_the_values(
    wide: TinySetup, engine: TorchEngine, likelihood: bool
) -> None:
    guide = random_guide(wide.catalog, seed=2)
    config = VedConfig(budget=60, width=4, likelihood=likelihood, entropy_weight=0.0)
    found = ved(engine, wide.prompts, config, count=8, seed=1, critic=guide)
    prompt = np.repeat(np.arange(len(wide.prompts)), found.count)
    reward = guide.reward(wide.prompts, prompt, found.leaf)
    assert found.value is not None
    last = found.value[range(len(found.leaf)), (found.node >= 0).sum(1) - 1]
    evaluated = ~np.isnan(last)
    assert evaluated.mean() > 0.5
    np.testing.assert_allclose(last[evaluated], reward[evaluated], atol=1e-5)
    # Scores are the policy's own.
    every = beam(engine, wide.prompts, width=200)
    for row, rows in enumerate(np.split(np.arange(len(found.leaf)), found.start[1:-1])):
        known = every.select(np.array([row]))
        place = known.leaf.argsort()[found.leaf[rows]]
        np.testing.assert_allclose(found.score[rows], known.score[place], atol=1e-4)


def test_likelihood_changes_what_a_guided_search_finds(
    wide: TinySetup, engine: TorchEngine
) -> None:
    guide = random_guide(wide.catalog, seed=2)
    published, both = (
        ved(
            engine, wide.prompts, VedConfig(budget=40, width=4, likelihood=likelihood),
            count=8, seed=1, critic=guide,
        )
        for likelihood in (False, True)
    )  # fmt: skip
    assert leaves(published) != leaves(both)
    prompt = np.repeat(np.arange(len(wide.prompts)), published.count)
    mine = np.repeat(np.arange(len(wide.prompts)), both.count)
    # What the search ranks by is larger where it is part of the priority.
    assert (both.score + guide.reward(wide.prompts, mine, both.leaf)).mean() > (
        published.score + guide.reward(wide.prompts, prompt, published.leaf)
    ).mean()
