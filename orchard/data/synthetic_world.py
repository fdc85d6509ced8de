"""Simulate users with drifting tastes over a tree of items.

The levels of the tree are the codes of the semantic IDs. A *taste* (`interest`) is a node one level
above the leaves, a *category* its parent. Each user has a few tastes, which drift. Each next item
is, with fixed probabilities,

    a successor of the last item    a sequel (same taste) or a complement (another first code)
    noise                           any item, by popularity
    driven by taste                 an item of one of the tastes, sometimes only of its category

so that the codes of a history predict the next item at every level, and their order matters.

Shapes:  I items   L levels   U users   E events of all users   K tastes of a user   S successors
         N nodes of one depth   R rows
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Float64, Int64

from orchard import ragged
from orchard.errors import ConfigError

_DAY_S = 86_400
_FIRST_DAY = 1_577_836_800
"""2020-01-01 in seconds since 1970."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldParams:
    """Parameters of a synthetic world."""

    seed: int = 0
    num_items: int = 2000
    num_users: int = 4000
    level_size: tuple[int, ...] = ()
    """Number of codes of each level; by default three levels scaled to `num_items`."""
    collision_share: float = 0.01
    """Share of the items that have the semantic ID of another item."""
    fanout_skew: float = 1.2
    """Zipf exponent of the codes below one prefix; 0 spreads items evenly over the tree."""
    popularity_skew: float = 0.5
    """Zipf exponent of the items' popularity."""
    min_events: int = 5
    """Minimum number of interactions per user."""
    mean_events: float = 8.5
    """Mean number of interactions per user; n interactions make n - 1 rows."""
    max_history: int = 10
    """Maximum number of items in a row's history."""
    tastes_per_user: int = 3
    """Number of tastes that a user has at a time."""
    focus: float = 0.7
    """Share of the taste-driven interactions within the taste itself, not only its category."""
    drift: float = 0.15
    """Probability that one of the user's tastes changes before an interaction."""
    transition_share: float = 0.35
    """Share of the interactions with a successor of the last item."""
    successors: int = 4
    """Number of successors of an item; each is half as likely as the one before."""
    noise_share: float = 0.1
    """Share of the interactions with an item drawn by popularity alone."""
    days: int = 730
    """Number of days over which users arrive; each is active for about a third of them."""

    def __post_init__(self) -> None:
        """Set the default of `level_size`; raise ConfigError for a value out of bounds."""
        minimum = {"num_items": 10, "num_users": 10, "min_events": 2}
        minimum |= dict.fromkeys(("max_history", "tastes_per_user", "successors", "days"), 1)
        minimum |= dict.fromkeys(("seed", "fanout_skew", "popularity_skew"), 0)
        for name, bound in {**minimum, "mean_events": self.min_events}.items():
            if not getattr(self, name) >= bound:
                raise ConfigError(f"{name} = {getattr(self, name)} is below {bound}; raise it")
        for name in ("collision_share", "focus", "drift", "transition_share", "noise_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} = {getattr(self, name)} is not a share; use 0 to 1")
        if self.transition_share + self.noise_share > 1:
            raise ConfigError(
                f"transition_share = {self.transition_share} and noise_share = {self.noise_share} "
                "exceed 1 together; what they leave is driven by taste"
            )
        if not self.level_size:
            growth = (self.num_items / 2000) ** (1 / 3)
            sizes = tuple(max(2, round(size * growth)) for size in (16, 32, 64))
            object.__setattr__(self, "level_size", sizes)
        num_sids = int(np.prod(np.asarray(self.level_size, dtype=object)))
        if min(self.level_size) < 2 or max(self.level_size) > 2**15:
            raise ConfigError(f"level_size = {self.level_size} needs entries from 2 to {2**15}")
        if num_sids < 2 * self.num_items:
            raise ConfigError(
                f"level_size = {self.level_size} has room for {num_sids} semantic IDs, too few for "
                f"num_items = {self.num_items}; leave half of them free"
            )


@dataclass(frozen=True, kw_only=True)
class SyntheticWorld:
    """Items with their codes, popularity and successors."""

    params: WorldParams
    code: Int64[np.ndarray, "I L"]
    popularity: Float64[np.ndarray, " I"]
    """Probability of each item under popularity; sums to one."""
    next_items: Int64[np.ndarray, "I S"]

    @cached_property
    def order(self) -> Int64[np.ndarray, " I"]:
        """Items sorted by semantic ID, so that those below any node are contiguous."""
        return np.lexsort(self.code.T[::-1])

    @cached_property
    def mass(self) -> Float64[np.ndarray, " I1"]:
        """Total popularity of the items before each position of `order`."""
        return np.concatenate([[0.0], np.cumsum(self.popularity[self.order])])

    @cached_property
    def next_item_probs(self) -> Float64[np.ndarray, " S"]:
        """Probability of each successor, given that one follows."""
        share = 0.5 ** np.arange(self.params.successors)
        return share / share.sum()

    def node(self, depth: int) -> Int64[np.ndarray, " I"]:
        """Return the tree node of each item at a depth, numbered in the order of their codes."""
        _, node = np.unique(self.code[:, :depth], axis=0, return_inverse=True)
        return node.reshape(-1) if depth else np.zeros(len(self.code), dtype=np.int64)

    @cached_property
    def interest(self) -> Int64[np.ndarray, " I"]:
        """Taste node of each item."""
        return self.node(max(1, self.code.shape[1] - 1))

    @cached_property
    def category(self) -> Int64[np.ndarray, " I"]:
        """Category node of each item."""
        return self.node(max(1, self.code.shape[1] - 1) - 1)

    @cached_property
    def category_of_interest(self) -> Int64[np.ndarray, " N"]:
        """Category node of each taste."""
        category_of = np.zeros(int(self.interest.max()) + 1, dtype=np.int64)
        category_of[self.interest] = self.category
        return category_of

    def draw(
        self,
        node_of_item: Int64[np.ndarray, " I"],
        node: Int64[np.ndarray, " R"],
        rng: np.random.Generator,
    ) -> Int64[np.ndarray, " R"]:
        """Draw an item below each node by popularity, with nodes numbered as by `node`."""
        bounds = np.searchsorted(node_of_item[self.order], [node, node + 1])
        # [2, R] first and last position of each node in `order`; draw a position between by mass
        low, high = self.mass[bounds]
        position = (
            np.searchsorted(self.mass, low + (high - low) * rng.random(len(node)), "right") - 1
        )
        return self.order[np.clip(position, bounds[0], bounds[1] - 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Events:
    """Interactions of all users; those of user u are `start[u] : start[u + 1]`, oldest first."""

    start: Int64[np.ndarray, " U1"]
    item: Int64[np.ndarray, " E"]
    timestamp: Int64[np.ndarray, " E"]
    """Seconds since 1970."""
    interest: Int64[np.ndarray, "E K"]
    """Tastes of the user at each event."""


def make_world(params: WorldParams, rng: np.random.Generator) -> SyntheticWorld:
    """Generate items with their codes, popularity and successors."""
    code = _codes(params, rng)
    num_items = len(code)
    weight = (1.0 + rng.permutation(num_items)) ** -params.popularity_skew
    no_successors = np.zeros((num_items, 0), dtype=np.int64)
    world = SyntheticWorld(
        params=params, code=code, popularity=weight / weight.sum(), next_items=no_successors
    )
    # The complement of a first code is one other first code, the same for all its items: a rule
    # that is simple in codes, but must be learned for every item from item identities.
    root_code = world.node(1)
    cycle = rng.permutation(root_code.max() + 1)
    complement = np.empty_like(cycle)
    complement[cycle] = np.roll(cycle, -1)
    item_index = np.arange(num_items)
    columns: list[Int64[np.ndarray, " I"]] = []
    for rank in range(params.successors):
        sequel = world.draw(world.interest, world.interest, rng)
        same_category = world.draw(world.category, world.category, rng)
        # In small tastes most items would follow themselves; in real shops few percent do.
        sequel = np.where(sequel == item_index, same_category, sequel)
        columns.append(
            sequel if rank % 2 == 0 else world.draw(root_code, complement[root_code], rng)
        )
    return replace(world, next_items=np.stack(columns, axis=1))


def simulate_users(world: SyntheticWorld, rng: np.random.Generator) -> Events:
    """Simulate every user's interactions."""
    params = world.params
    extra = params.mean_events - params.min_events
    count = params.min_events - 1 + rng.geometric(1 / (1 + extra), params.num_users)
    start = ragged.starts(np.minimum(count, params.min_events + 10 * int(extra + 1)))
    count = np.diff(start)
    item = np.zeros(start[-1], dtype=np.int64)
    tastes_of_event = np.zeros((start[-1], params.tastes_per_user), dtype=np.int64)
    tastes = _first_tastes(world, rng)
    for position in range(int(count.max())):
        user = np.flatnonzero(count > position)
        event = start[user] + position
        tastes[user] = drifted(world, tastes[user], rng)
        tastes_of_event[event] = tastes[user]
        # A first item has no predecessor, so it is driven by taste.
        transition_draw = rng.random(len(user)) if position else np.ones(len(user))
        item[event] = _next(world, item[event - 1], tastes[user], transition_draw, rng)
    stay_s = params.days * _DAY_S / 3
    gap = 1 + rng.exponential(stay_s / params.mean_events, len(item)).astype(np.int64)
    gap[start[:-1]] = _FIRST_DAY + rng.integers(params.days * _DAY_S, size=len(count))
    total = ragged.starts(gap)
    timestamp = total[1:] - total[start[ragged.row_of(start)]]
    return Events(start=start, item=item, timestamp=timestamp, interest=tastes_of_event)


def _codes(params: WorldParams, rng: np.random.Generator) -> Int64[np.ndarray, "I L"]:
    """Draw the codes of all items: a ragged tree with few collisions, items in random order."""
    num_collided = round(params.collision_share * params.num_items)
    num_distinct = params.num_items - num_collided
    codes = np.zeros((0, len(params.level_size)), dtype=np.int64)
    # A skewed tree runs out of likely leaves; lowering the skew in each round guarantees an end.
    skew = params.fanout_skew
    while len(codes) < num_distinct:
        candidates = np.concatenate([codes, _descents(params, skew, 2 * params.num_items, rng)])
        _, first = np.unique(candidates, axis=0, return_index=True)
        codes = candidates[np.sort(first)][:num_distinct]
        skew *= 0.8
    collided_codes = codes[rng.integers(num_distinct, size=num_collided)]
    return rng.permutation(np.concatenate([codes, collided_codes]))


def _descents(
    params: WorldParams, skew: float, num: int, rng: np.random.Generator
) -> Int64[np.ndarray, "R L"]:
    """Draw random walks from the root, where each prefix prefers different codes."""
    code = np.zeros((num, 0), dtype=np.int64)
    for level, size in enumerate(params.level_size):
        share = (1.0 + np.arange(size)) ** -skew
        rank = np.searchsorted(np.cumsum(share)[:-1] / share.sum(), rng.random(num), "right")
        # A prefix must prefer the same codes in every round, so its most likely code is computed
        # from its codes, with multipliers drawn from a generator of the level.
        steps = np.random.default_rng([params.seed, level]).integers(1, 1 << 30, level)
        start = (code * steps).sum(axis=1)
        code = np.concatenate([code, ((rank + start) % size)[:, None]], axis=1)
    return code


def _first_tastes(world: SyntheticWorld, rng: np.random.Generator) -> Int64[np.ndarray, "U K"]:
    """Draw initial tastes by popularity, where one user's are often of one category."""
    shape = (world.params.num_users, world.params.tastes_per_user)
    root_node = np.zeros(len(world.code), dtype=np.int64)
    item = world.draw(root_node, np.zeros(shape[0] * shape[1], dtype=np.int64), rng)
    taste = world.interest[item].reshape(shape)
    related_item = world.draw(
        world.category, world.category_of_interest[np.repeat(taste[:, 0], shape[1])], rng
    )
    is_related = rng.random(shape) < world.params.focus / 2
    return np.where(is_related, world.interest[related_item].reshape(shape), taste)


def drifted(
    world: SyntheticWorld,
    tastes: Int64[np.ndarray, "R K"],
    rng: np.random.Generator,
    drift: float | None = None,
) -> Int64[np.ndarray, "R K"]:
    """Replace, with probability `drift`, one taste of a user by another of its category.

    By default the probability is that of the world.
    """
    share = world.params.drift if drift is None else drift
    rows = np.flatnonzero(rng.random(len(tastes)) < share)
    slot = rng.integers(tastes.shape[1], size=len(tastes))
    new_tastes = tastes.copy()
    category = world.category_of_interest[tastes[rows, slot[rows]]]
    new_tastes[rows, slot[rows]] = world.interest[world.draw(world.category, category, rng)]
    return new_tastes


def _next(
    world: SyntheticWorld,
    last_item: Int64[np.ndarray, " R"],
    tastes: Int64[np.ndarray, "R K"],
    transition_draw: Float64[np.ndarray, " R"],
    rng: np.random.Generator,
) -> Int64[np.ndarray, " R"]:
    """Draw the next item of each user; `transition_draw` in [0, 1] selects the mechanism."""
    params, num = world.params, len(last_item)
    rank = rng.choice(params.successors, size=num, p=world.next_item_probs)
    taste = tastes[np.arange(num), rng.integers(tastes.shape[1], size=num)]
    taste_item = world.draw(world.interest, taste, rng)
    category_item = world.draw(world.category, world.category_of_interest[taste], rng)
    driven_item = np.where(rng.random(num) < params.focus, taste_item, category_item)
    noise_item = rng.choice(len(world.popularity), size=num, p=world.popularity)
    is_driven = transition_draw >= params.transition_share + params.noise_share
    is_successor = transition_draw < params.transition_share
    return np.where(
        is_driven,
        driven_item,
        np.where(is_successor, world.next_items[last_item, rank], noise_item),
    )
