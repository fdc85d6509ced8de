"""Value-guided efficient decoding (VED) of V-STAR, arXiv 2602.10699: a search with a token budget.

A beam search initializes the tree of each prompt. Each simulation (a traversal in the settings and
the counts) then descends from the root to the child with the largest

    U(s) = G(s) + beta sqrt(ln(simulations + 1) / (visits(s) + 1)),   G(s) = V(s) + lambda H(s)

until there is none (G = V at a leaf; H is the entropy over legal children). Every node on the path
that has free children and whose G reaches the mean of its depth is expanded by one child, drawn
from the policy over the free ones. When the budget is spent, the leaves of highest value are the
candidates; if they are too few, free leaves below visited prefixes complete them, which needs no
further forward pass.

With `rollout.ved.likelihood`, log p is a summand of G, and of the value by which the candidates are
chosen.

All prompts advance together in shared forward passes, and G of a node never changes. For each point
that the paper leaves open, `orchard.settings.VedConfig` has a setting.

Shapes:  B prompts   N visited nodes   F chosen nodes   A active prompts   P nodes on a path
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
from orchard.guide.values import Valuer, Values
from orchard.settings import VedConfig
from orchard.types import Prompts
from rollout.candidates import Candidates
from rollout.engine.protocol import DecodingBackend
from rollout.item_filter import ItemFilter, PrefixMask, make_prefix_mask
from rollout.search.draws import draw, uniforms
from rollout.search.topk import top_k
from rollout.search.ved.select import select_candidates
from rollout.search.ved.tree import expand, expand_roots

TRAVERSALS_PER_TOKEN = 4
"""Maximum number of simulations of a prompt per token of its budget. The budget itself does not
bound them, since a simulation without expansions costs no tokens."""


def ved(
    engine: DecodingBackend,
    prompts: Prompts,
    settings: VedConfig,
    *,
    count: int,
    seed: int,
    allowed: ItemFilter | None = None,
    critic: Valuer | None = None,
) -> Candidates:
    """Return up to `count` candidates per prompt, from at most `settings.budget` forward tokens.

    The candidates of a prompt depend only on `seed` and its id, not on its batch. They are fewer
    than `count` if too few leaves can be completed without a forward pass. The cost counts
    `traversals`, selections of a child without the highest priority G (`overruled`), nodes whose G
    was below the mean of their depth (`refused`), and expansions by depth (`expanded_1`, ...).

    With `allowed`, only prefixes of allowed leaves are visited and drawn. Values come from the
    `critic`, or from the policy's own head without one.

    Raises:
        CatalogError: `allowed` belongs to another catalog or another batch.
        ConfigError: the budget does not cover the beam.
        EngineError: a prompt does not fit the engine, the policy has diverged, or there is neither
            a critic nor a value head.
    """
    check_budget(settings, engine.trie)
    mask = make_prefix_mask(engine.trie, allowed, len(prompts)) if allowed else None
    values = critic.values(prompts) if critic else None
    search = _Search(engine, prompts, settings, seed, mask, values)
    search.init_with_beam()
    limit = TRAVERSALS_PER_TOKEN * settings.budget
    simulation = 0
    while simulation < limit and (active := search.active()).any():
        for _ in range(min(settings.traversals, limit - simulation)):
            search.simulate(active & search.active(), simulation)
            simulation += 1
        search.evaluate_pending()
    cost = replace(search.cost, counts=search.counts)
    return select_candidates(
        engine.trie, search.visited, count, len(prompts), cost, likelihood=settings.likelihood
    )


def check_budget(settings: VedConfig, trie: Trie) -> None:
    """Raise ConfigError unless the budget covers the initial beam search."""
    depth = trie.depth
    least = 1 + settings.width * (depth if settings.count_leaves else depth - 1)
    if settings.budget < least:
        raise ConfigError(
            f"rollout.ved.budget = {settings.budget} cannot cover depth {depth} with beam "
            f"{settings.width}; raise it to at least {least}, or lower rollout.ved.width"
        )


@dataclass
class _PendingExpansion:
    """Children chosen for expansion in the next forward pass."""

    entry: Int64[np.ndarray, " F"]
    """Index of each child among the children of all nodes."""
    owner: Int64[np.ndarray, " F"]
    """Tree node of each child's parent."""
    stream: Int64[np.ndarray, " F"]
    """Column of each child in the table of uniform numbers; later draws below it use the next."""


class _Search:
    """State of a search over all prompts."""

    def __init__(
        self,
        engine: DecodingBackend,
        prompts: Prompts,
        settings: VedConfig,
        seed: int,
        mask: PrefixMask | None,
        values: Values | None,
    ) -> None:
        self._engine, self._settings, self._mask, self._values = engine, settings, mask, values
        self.visited, self.cost = expand_roots(engine, prompts, mask, values)
        depth, self.counts = engine.trie.depth, Counter[str]()
        # Tokens spent per prompt; the root's own distribution counts as one, as in the paper.
        self._spent = np.ones(len(prompts), np.int64)
        self._visits = np.zeros(len(prompts), np.int64)  # of each node
        self._simulations = np.zeros(len(prompts), np.int64)  # of each prompt
        rows = TRAVERSALS_PER_TOKEN * settings.budget
        draws = uniforms(prompts.id, rows, depth * depth, seed).numpy()
        self._uniform: Float64[np.ndarray, "B rows levels"] = draws.reshape(len(prompts), rows, -1)
        self._pending: list[_PendingExpansion] = []

    def active(self) -> Bool[np.ndarray, " B"]:
        """Return which prompts have budget and free children left."""
        free = np.bincount(self.visited.prompt, self.visited.num_free(), minlength=len(self._spent))
        return (self._spent < self._settings.budget) & (free > 0)

    def init_with_beam(self) -> None:
        """Run beam search by log-probability and add all prefixes that it forwards to the tree.

        A child with forced codes is forwarded at the depth of the last of them if it is still in
        the beam there, so that no level costs more tokens than the width of the beam.
        """
        beams = np.arange(len(self._spent))  # tree nodes in the beam
        # Children in the beam that are not forwarded yet, and their parents in the tree.
        entry = owner = np.zeros(0, np.int64)
        for depth in range(1, self._engine.trie.depth + 1):
            tree = self.visited
            is_leaf = tree.is_leaf[beams]
            parents, leaves = beams[~is_leaf], beams[is_leaf]
            new, above = tree.free_children(parents)
            entry, owner = np.concatenate([entry, new]), np.concatenate([owner, parents[above]])
            kept = self._top(
                np.concatenate([tree.prompt[leaves], tree.prompt[owner]]),
                np.concatenate([tree.score[leaves], tree.score[owner] + tree.child_logprob[entry]]),
                np.concatenate([tree.node[leaves], tree.child[entry]]),
            )
            num_leaves = len(leaves)
            beams, alive = leaves[kept[kept < num_leaves]], kept[kept >= num_leaves] - num_leaves
            entry, owner = entry[alive], owner[alive]
            ready = self._ends(entry)[0] == depth
            beams = np.concatenate([beams, np.arange(ready.sum()) + len(tree)])
            self._spent += self._charge(entry[ready], owner[ready])[0]
            self._visit(entry[ready], owner[ready])
            entry, owner = entry[~ready], owner[~ready]
        if self._settings.warm_visits:
            self._simulations = np.bincount(self.visited.prompt[beams], minlength=len(self._spent))
            while len(beams):
                np.add.at(self._visits, beams, 1)
                beams = self.visited.parent[beams]
                beams = beams[beams >= 0]

    def _top(
        self,
        prompt: Int64[np.ndarray, " M"],
        score: Float32[np.ndarray, " M"],
        node: Int64[np.ndarray, " M"],
    ) -> Int64[np.ndarray, " F"]:
        """Select the entries of highest score of each prompt, up to the width of the beam."""
        order = prompt.argsort(kind="stable")
        start = ragged.starts(np.bincount(prompt, minlength=len(self._spent)))
        kept = top_k(
            torch.from_numpy(start),
            torch.from_numpy(score[order]),
            torch.from_numpy(node[order]),
            self._settings.width,
        )
        return order[kept.numpy()]

    def simulate(self, active: Bool[np.ndarray, " B"], simulation: int) -> None:
        """Descend once for each active prompt and queue expansions of the nodes on the path."""
        tree, settings = self.visited, self._settings
        priority = self._priority()
        mean = self._depth_means(priority)
        path = self._descend(active, priority)
        inside = path >= 0
        np.add.at(self._visits, path[inside], 1)
        self._simulations += active
        row, level = np.nonzero(inside)
        node = path[row, level]
        expandable = tree.num_free()[node] > 0
        if not settings.expand_root:
            expandable &= tree.depth[node] > 0
        node, level = node[expandable], level[expandable]
        # Rounding may put the mean of equal numbers slightly above them.
        passes = priority[node] >= mean[tree.prompt[node], tree.depth[node]] - 1e-9
        self.counts["refused"] += int((~passes).sum())
        stream = simulation * self._uniform.shape[2] + level * self._engine.trie.depth
        self._draw_children(node[passes], stream[passes])
        self.counts["traversals"] += int(active.sum())

    def evaluate_pending(self) -> None:
        """Evaluate pending expansions in one forward pass; more passes follow with `to_leaf`."""
        while self._pending:
            entry = np.concatenate([pending.entry for pending in self._pending])
            owner = np.concatenate([pending.owner for pending in self._pending])
            stream = np.concatenate([pending.stream for pending in self._pending])
            first, self._pending = len(self.visited), []
            self._visit(entry, owner)
            if self._settings.to_leaf:
                new = np.arange(first, len(self.visited))
                inner = ~self.visited.is_leaf[new]
                self._draw_children(new[inner], stream[inner] + 1)

    def _visit(self, entry: Int64[np.ndarray, " F"], owner: Int64[np.ndarray, " F"]) -> None:
        """Evaluate chosen children and add them to the tree."""
        if len(entry) == 0:
            return
        self.visited, cost = expand(
            self._engine, self.visited, entry, owner, self._mask, self._values
        )
        self._visits = np.concatenate([self._visits, np.zeros(len(entry), np.int64)])
        self.cost += cost

    def _priority(self) -> Float64[np.ndarray, " N"]:
        """Return G of every node."""
        tree, settings = self.visited, self._settings
        value = settings.value_weight * tree.value.astype(np.float64)
        if settings.likelihood:
            value = value + tree.score
        return value + settings.entropy_weight * tree.entropy

    def _depth_means(self, priority: Float64[np.ndarray, " N"]) -> Float64[np.ndarray, "B L"]:
        """Return the mean priority of each prompt's nodes by depth."""
        levels = self._engine.trie.depth + 1
        key, size = self.visited.prompt * levels + self.visited.depth, len(self._spent) * levels
        total = np.bincount(key, priority, minlength=size)
        count = np.bincount(key, minlength=size)
        return (total / np.maximum(count, 1)).reshape(-1, levels)

    def _descend(
        self, active: Bool[np.ndarray, " B"], priority: Float64[np.ndarray, " N"]
    ) -> Int64[np.ndarray, "A P"]:
        """Return the path from the root to the last selected node by prompt, -1 past its end."""
        tree = self.visited
        exploration = np.log(self._simulations[tree.prompt] + 1) / (self._visits + 1)
        bound = priority + self._settings.exploration * np.sqrt(exploration)
        current = np.where(active, np.arange(len(active)), -1)  # node of each prompt
        path = [current[active]]
        while True:
            child = np.flatnonzero((tree.parent >= 0) & (current[tree.prompt] == tree.parent))
            if len(child) == 0:
                return np.stack(path, 1)
            selected, greedy = (self._argmax(child, key) for key in (bound[child], priority[child]))
            self.counts["overruled"] += int((selected != greedy).sum())
            current = np.full(len(active), -1)
            current[tree.prompt[selected]] = selected
            path.append(current[active])

    def _argmax(
        self, node: Int64[np.ndarray, " F"], key: Float64[np.ndarray, " F"]
    ) -> Int64[np.ndarray, " A"]:
        """Return the node of largest key per prompt; ties by value, log-probability, trie node."""
        tree = self.visited
        order = np.lexsort(
            (tree.node[node], -tree.logprob[node], -tree.value[node], -key, tree.prompt[node])
        )
        prompt = tree.prompt[node[order]]
        return node[order[np.flatnonzero(np.diff(prompt, prepend=-1))]]

    def _draw_children(
        self, node: Int64[np.ndarray, " F"], stream: Int64[np.ndarray, " F"]
    ) -> None:
        """Draw a free child of each node within the budget, and queue them for evaluation."""
        tree = self.visited
        entry, owner = tree.free_children(node)
        # Drop nodes without free children.
        rows = np.unique(owner)
        node, stream, owner = node[rows], stream[rows], np.searchsorted(rows, owner)
        if len(node) == 0:
            return
        start = ragged.starts(np.bincount(owner, minlength=len(node)))
        children = Children(
            node=torch.from_numpy(tree.child[entry]),
            owner=torch.from_numpy(owner),
            start=torch.from_numpy(start),
        )
        uniform = self._uniform.reshape(len(self._spent), -1)[tree.prompt[node], stream]
        pick = draw(
            torch.from_numpy(tree.child_logprob[entry]),
            children,
            torch.ones(len(owner), dtype=torch.bool),
            torch.arange(len(node)),
            torch.from_numpy(uniform),
            1.0,
        ).numpy()
        spent, affordable = self._charge(entry[pick], node)
        self._spent += spent
        pick, node, stream = pick[affordable], node[affordable], stream[affordable]
        tree.taken[entry[pick]] = True
        for depth in tree.depth[node].tolist():
            self.counts[f"expanded_{depth + 1}"] += 1
        self._pending.append(_PendingExpansion(entry[pick], node, stream))

    def _ends(
        self, entry: Int64[np.ndarray, " F"]
    ) -> tuple[Int64[np.ndarray, " F"], Bool[np.ndarray, " F"]]:
        """Return the depth after the forced codes of each child, and whether a leaf is there."""
        trie = self._engine.trie
        below = trie.descend(torch.from_numpy(self.visited.child[entry]).to(trie.code.device))
        return trie.depth_of(below).cpu().numpy(), (trie.num_children(below) == 0).cpu().numpy()

    def _charge(
        self, entry: Int64[np.ndarray, " F"], owner: Int64[np.ndarray, " F"]
    ) -> tuple[Int64[np.ndarray, " B"], Bool[np.ndarray, " F"]]:
        """Return the tokens that each prompt spends on children, and which children it affords."""
        tree, size = self.visited, len(self._spent)
        depth, is_leaf = self._ends(entry)
        tokens = depth - tree.depth[owner] - (is_leaf & (not self._settings.count_leaves))
        prompt = tree.prompt[owner]
        order = prompt.argsort(kind="stable")
        running = np.cumsum(tokens[order])
        first = ragged.starts(np.bincount(prompt, minlength=size))[:-1]
        # Tokens of each child and the chosen ones of its prompt before it.
        total = np.empty_like(running)
        total[order] = running - np.concatenate([[0], running])[first][prompt[order]]
        affordable = self._spent[prompt] + total <= self._settings.budget
        paid = np.bincount(prompt, np.where(affordable, tokens, 0), minlength=size)
        return paid.astype(np.int64), affordable
