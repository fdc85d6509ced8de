"""Value-guided efficient decoding (VED) of V-STAR, arXiv 2602.10699: a search with a token budget.

A likelihood beam begins the tree of each prompt. Each traversal then descends from the root to the
child with the largest

    U(s) = G(s) + beta sqrt(ln(traversals + 1) / (visits(s) + 1)),   G(s) = V(s) + lambda H(s)

until there is none (G = V at a leaf; H is the entropy over legal children). Every node on the way
that has free children and whose G reaches the mean of its depth grows one child, drawn from the
policy over the free ones. When the budget is spent, the leaves of the highest value are the
candidates; where they are too few, free leaves below visited prefixes complete them, by
distributions that are known already.

All prompts advance together, one forward pass for all of them, and G of a node never changes.
Where the paper leaves a point open, `orchard.settings.VedConfig` has a switch.

Shapes:  B prompts   N nodes visited   F nodes chosen   A prompts in play   P nodes on a path
         C candidates   L levels of decisions   M entries
"""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64

from orchard import ragged
from orchard.catalog.trie import Children, Trie
from orchard.errors import ConfigError
from orchard.scorers.prefix_critic import PrefixCritic, Values
from orchard.settings import VedConfig
from orchard.types import Prompts
from rollout.candidates import Candidates
from rollout.engine.protocol import DecodingBackend
from rollout.item_filter import ItemFilter, PrefixMask, make_prefix_mask
from rollout.search.beam import draw, uniforms
from rollout.search.topk import top_k
from rollout.search.ved.select import select_candidates
from rollout.search.ved.tree import expand, expand_roots

TRAVERSALS_PER_TOKEN = 4
"""Bound on the traversals of a prompt: one that grows nothing costs nothing."""


def ved(
    engine: DecodingBackend,
    prompts: Prompts,
    settings: VedConfig,
    *,
    count: int,
    seed: int,
    allowed: ItemFilter | None = None,
    critic: PrefixCritic | None = None,
) -> Candidates:
    """Up to `count` candidates per prompt, within `settings.budget` forward tokens each.

    What is found for a prompt depends on `seed` and on its id alone, not on its batch. A prompt
    gets fewer candidates where too few leaves can be reached without a further forward pass. The
    cost tells, by name, how often the selection went against the priority (`overruled`), how often
    the gate refused (`refused`), and how many children grew at each depth (`expanded_1`, ...).

    With `allowed`, only prefixes that lead to a leaf that the prompt may find are visited; draws
    are then among the free children that do. With a `critic`, V is what it says; without one, what
    the policy's own head says.

    Raises:
        CatalogError: `allowed` belongs to another catalog or another batch.
        ConfigError: the budget does not cover the beam.
        EngineError: a prompt does not fit the engine, the policy has diverged, or there is neither
            a critic nor a value head.
    """
    check_budget(settings, engine.trie)
    entry = make_prefix_mask(engine.trie, allowed, len(prompts)) if allowed else None
    values = critic.values(prompts) if critic else None
    search = _Search(engine, prompts, settings, seed, entry, values)
    search.begin()
    limit = TRAVERSALS_PER_TOKEN * settings.budget
    traversal = 0
    while traversal < limit and (active := search.active()).any():
        for _ in range(min(settings.traversals, limit - traversal)):
            search.traverse(active & search.active(), traversal)
            traversal += 1
        search.evaluate()
    cost = replace(search.cost, counts=search.counts)
    return select_candidates(engine.trie, search.visited, count, len(prompts), cost)


def check_budget(settings: VedConfig, trie: Trie) -> None:
    """Raise ConfigError unless the budget covers the beam that a tree begins with."""
    depth = trie.depth
    least = 1 + settings.width * (depth if settings.count_leaves else depth - 1)
    if settings.budget < least:
        raise ConfigError(
            f"rollout.ved.budget = {settings.budget} cannot cover depth {depth} with beam "
            f"{settings.width}; raise it to at least {least}, or lower rollout.ved.width"
        )


@dataclass
class _Growth:
    """Children that wait for the next forward pass."""

    entry: Int64[np.ndarray, " F"]
    owner: Int64[np.ndarray, " F"]
    stream: Int64[np.ndarray, " F"]
    """Column of the table of uniform numbers for what may follow the child."""


class _Search:
    """The state of a search over all prompts."""

    def __init__(
        self,
        engine: DecodingBackend,
        prompts: Prompts,
        settings: VedConfig,
        seed: int,
        entry: PrefixMask | None,
        values: Values | None,
    ) -> None:
        self._engine, self._settings, self._gate, self._values = engine, settings, entry, values
        self.visited, self.cost = expand_roots(engine, prompts, entry, values)
        depth, self.counts = engine.trie.depth, Counter[str]()
        # The root's own distribution counts one, as in the paper.
        self._spent = np.ones(len(prompts), np.int64)
        self._visits = np.zeros(len(prompts), np.int64)
        self._passed = np.zeros(len(prompts), np.int64)
        rows = TRAVERSALS_PER_TOKEN * settings.budget
        draws = uniforms(prompts.id, rows, depth * depth, seed).numpy()
        self._uniform: Float64[np.ndarray, "B rows levels"] = draws.reshape(len(prompts), rows, -1)
        self._waiting: list[_Growth] = []

    def active(self) -> Bool[np.ndarray, " B"]:
        """Prompts with budget left and something left to grow."""
        free = np.bincount(self.visited.prompt, self.visited.num_free(), minlength=len(self._spent))
        return (self._spent < self._settings.budget) & (free > 0)

    def begin(self) -> None:
        """Likelihood beam search; all prefixes that it visits are in the tree.

        A child with forced codes is visited once it has survived down to the last of them: no level
        costs more tokens than the beam is wide.
        """
        beams = np.arange(len(self._spent))
        entry = owner = np.zeros(0, np.int64)
        for step in range(1, self._engine.trie.depth + 1):
            tree = self.visited
            grows = ~tree.is_leaf[beams]
            parents, waits = beams[grows], beams[~grows]
            new, above = tree.free_children(parents)
            entry, owner = np.concatenate([entry, new]), np.concatenate([owner, parents[above]])
            kept = self._best(
                np.concatenate([tree.prompt[waits], tree.prompt[owner]]),
                np.concatenate([tree.score[waits], tree.score[owner] + tree.child_logprob[entry]]),
                np.concatenate([tree.node[waits], tree.child[entry]]),
            )
            beams, alive = waits[kept[kept < len(waits)]], kept[kept >= len(waits)] - len(waits)
            entry, owner = entry[alive], owner[alive]
            here = self._ends(entry)[0] == step
            beams = np.concatenate([beams, np.arange(here.sum()) + len(tree)])
            self._spent += self._charge(entry[here], owner[here])[0]
            self._visit(entry[here], owner[here])
            entry, owner = entry[~here], owner[~here]
        if self._settings.warm_visits:
            self._passed = np.bincount(self.visited.prompt[beams], minlength=len(self._spent))
            while len(beams):
                np.add.at(self._visits, beams, 1)
                beams = self.visited.parent[beams]
                beams = beams[beams >= 0]

    def _best(
        self,
        prompt: Int64[np.ndarray, " M"],
        score: Float32[np.ndarray, " M"],
        node: Int64[np.ndarray, " M"],
    ) -> Int64[np.ndarray, " F"]:
        """The likeliest entries of each prompt, as many as the beam is wide."""
        by = prompt.argsort(kind="stable")
        start = ragged.starts(np.bincount(prompt, minlength=len(self._spent)))
        kept = top_k(
            torch.from_numpy(start),
            torch.from_numpy(score[by]),
            torch.from_numpy(node[by]),
            self._settings.width,
        )
        return by[kept.numpy()]

    def traverse(self, active: Bool[np.ndarray, " B"], traversal: int) -> None:
        """Descend once for each active prompt; what grows on the way waits to be evaluated."""
        tree, settings = self.visited, self._settings
        priority = self._priority()
        mean = self._depth_means(priority)
        path = self._descend(active, priority)
        inside = path >= 0
        np.add.at(self._visits, path[inside], 1)
        self._passed += active
        row, level = np.nonzero(inside)
        node = path[row, level]
        wide = tree.num_free()[node] > 0
        if not settings.expand_root:
            wide &= tree.depth[node] > 0
        node, level = node[wide], level[wide]
        # A mean of equal numbers may come out a rounding error above them.
        passes = priority[node] >= mean[tree.prompt[node], tree.depth[node]] - 1e-9
        self.counts["refused"] += int((~passes).sum())
        stream = traversal * self._uniform.shape[2] + level * self._engine.trie.depth
        self._grow(node[passes], stream[passes])
        self.counts["traversals"] += int(active.sum())

    def evaluate(self) -> None:
        """One forward pass for all that waits, and further ones where it is followed to a leaf."""
        while self._waiting:
            entry = np.concatenate([w.entry for w in self._waiting])
            owner = np.concatenate([w.owner for w in self._waiting])
            stream = np.concatenate([w.stream for w in self._waiting])
            first, self._waiting = len(self.visited), []
            self._visit(entry, owner)
            if self._settings.to_leaf:
                new = np.arange(first, len(self.visited))
                inner = ~self.visited.is_leaf[new]
                self._grow(new[inner], stream[inner] + 1)

    def _visit(self, entry: Int64[np.ndarray, " F"], owner: Int64[np.ndarray, " F"]) -> None:
        if len(entry) == 0:
            return
        self.visited, cost = expand(
            self._engine, self.visited, entry, owner, self._gate, self._values
        )
        self._visits = np.concatenate([self._visits, np.zeros(len(entry), np.int64)])
        self.cost += cost

    def _priority(self) -> Float64[np.ndarray, " N"]:
        """G of every node."""
        tree, settings = self.visited, self._settings
        value = settings.value_weight * tree.value.astype(np.float64)
        return value + settings.entropy_weight * tree.entropy

    def _depth_means(self, priority: Float64[np.ndarray, " N"]) -> Float64[np.ndarray, "B L"]:
        """Mean priority of each prompt's nodes by depth."""
        levels = self._engine.trie.depth + 1
        key, size = self.visited.prompt * levels + self.visited.depth, len(self._spent) * levels
        total = np.bincount(key, priority, minlength=size)
        count = np.bincount(key, minlength=size)
        return (total / np.maximum(count, 1)).reshape(-1, levels)

    def _descend(
        self, active: Bool[np.ndarray, " B"], priority: Float64[np.ndarray, " N"]
    ) -> Int64[np.ndarray, "A P"]:
        """The nodes from the root down to where the selection ends, -1 past it, by prompt."""
        tree = self.visited
        curiosity = np.log(self._passed[tree.prompt] + 1) / (self._visits + 1)
        bound = priority + self._settings.exploration * np.sqrt(curiosity)
        at = np.where(active, np.arange(len(active)), -1)
        path = [at[active]]
        while True:
            member = np.flatnonzero((tree.parent >= 0) & (at[tree.prompt] == tree.parent))
            if len(member) == 0:
                return np.stack(path, 1)
            winner, favourite = (
                self._first(member, key) for key in (bound[member], priority[member])
            )
            self.counts["overruled"] += int((winner != favourite).sum())
            at = np.full(len(active), -1)
            at[tree.prompt[winner]] = winner
            path.append(at[active])

    def _first(
        self, member: Int64[np.ndarray, " F"], key: Float64[np.ndarray, " F"]
    ) -> Int64[np.ndarray, " A"]:
        """The node of the largest key of each prompt; ties go by value, likelihood and code."""
        tree = self.visited
        by = np.lexsort(
            (tree.node[member], -tree.logprob[member], -tree.value[member], -key,
             tree.prompt[member])
        )  # fmt: skip
        prompt = tree.prompt[member[by]]
        return member[by[np.flatnonzero(np.diff(prompt, prepend=-1))]]

    def _grow(self, node: Int64[np.ndarray, " F"], stream: Int64[np.ndarray, " F"]) -> None:
        """Draw a free child of each node, as far as the budget goes, to be evaluated later."""
        tree = self.visited
        entry, owner = tree.free_children(node)
        some = np.unique(owner)
        node, stream, owner = node[some], stream[some], np.searchsorted(some, owner)
        if len(node) == 0:
            return
        start = ragged.starts(np.bincount(owner, minlength=len(node)))
        children = Children(
            node=torch.from_numpy(tree.child[entry]),
            owner=torch.from_numpy(owner),
            start=torch.from_numpy(start),
        )
        number = self._uniform.reshape(len(self._spent), -1)[tree.prompt[node], stream]
        pick = draw(
            torch.from_numpy(tree.child_logprob[entry]),
            children,
            torch.ones(len(owner), dtype=torch.bool),
            torch.arange(len(node)),
            torch.from_numpy(number),
            1.0,
        ).numpy()
        spent, affordable = self._charge(entry[pick], node)
        self._spent += spent
        pick, node, stream = pick[affordable], node[affordable], stream[affordable]
        tree.taken[entry[pick]] = True
        for depth in tree.depth[node].tolist():
            self.counts[f"expanded_{depth + 1}"] += 1
        self._waiting.append(_Growth(entry[pick], node, stream))

    def _ends(
        self, entry: Int64[np.ndarray, " F"]
    ) -> tuple[Int64[np.ndarray, " F"], Bool[np.ndarray, " F"]]:
        """Depth to which the forced codes after each child lead, and whether it is a leaf there."""
        trie = self._engine.trie
        below = trie.descend(torch.from_numpy(self.visited.child[entry]).to(trie.code.device))
        return trie.depth_of(below).cpu().numpy(), (trie.num_children(below) == 0).cpu().numpy()

    def _charge(
        self, entry: Int64[np.ndarray, " F"], owner: Int64[np.ndarray, " F"]
    ) -> tuple[Int64[np.ndarray, " B"], Bool[np.ndarray, " F"]]:
        """What each prompt pays for chosen children, in their order, and which it can afford."""
        tree, size = self.visited, len(self._spent)
        depth, is_leaf = self._ends(entry)
        tokens = depth - tree.depth[owner] - (is_leaf & (not self._settings.count_leaves))
        prompt = tree.prompt[owner]
        by = prompt.argsort(kind="stable")
        running = np.cumsum(tokens[by])
        first = ragged.starts(np.bincount(prompt, minlength=size))[:-1]
        total = np.empty_like(running)
        total[by] = running - np.concatenate([[0], running])[first][prompt[by]]
        affordable = self._spent[prompt] + total <= self._settings.budget
        paid = np.bincount(prompt, np.where(affordable, tokens, 0), minlength=size)
        return paid.astype(np.int64), affordable
