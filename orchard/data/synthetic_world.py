"""A made-up world of taste: who likes what, and what follows what.

Items hang in a tree of tastes whose levels are the codes of their semantic IDs. A *taste* is a node
one level above the leaves, a *department* its parent. A user holds a few tastes, which drift. Each
next item is, with fixed chances,

    a successor of the last item    a sequel (same taste) or a complement (another first code)
    noise                           any item, by popularity
    to the user's taste             an item of one of the tastes, now and then of its department

so that the codes of a history say what comes next, at every level, and their order matters.

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
    """What a synthetic world is like."""

    seed: int = 0
    num_items: int = 2000
    num_users: int = 4000
    level_size: tuple[int, ...] = ()
    """Codes per level, as many levels as entries; by default three levels that fit `num_items`."""
    collision_share: float = 0.01
    """Share of the items that carry another item's semantic ID."""
    fanout_skew: float = 1.2
    """Zipf exponent of the codes below one prefix; 0 spreads items evenly over the tree."""
    popularity_skew: float = 0.5
    """Zipf exponent of the items' popularity."""
    min_events: int = 5
    """Fewest interactions of a user."""
    mean_events: float = 8.5
    """Mean interactions of a user; n interactions make n - 1 rows."""
    max_history: int = 10
    """Most items in a row's history."""
    tastes_per_user: int = 3
    focus: float = 0.7
    """Share of the taste-driven interactions within the taste proper, not only its department."""
    drift: float = 0.15
    """Chance that one of the user's tastes changes before an interaction."""
    transition_share: float = 0.35
    """Share of the interactions that follow from the last item."""
    successors: int = 4
    """Items that may follow from an item; each is half as likely as the one before."""
    noise_share: float = 0.1
    """Share of the interactions that follow from nothing."""
    days: int = 730
    """Time over which users arrive; each stays for about a third of it."""

    def __post_init__(self) -> None:
        """Settle the sizes; raises ConfigError on a value out of bounds."""
        least = {"num_items": 10, "num_users": 10, "min_events": 2}
        least |= dict.fromkeys(("max_history", "tastes_per_user", "successors", "days"), 1)
        least |= dict.fromkeys(("seed", "fanout_skew", "popularity_skew"), 0)
        for name, bound in {**least, "mean_events": self.min_events}.items():
            if not getattr(self, name) >= bound:
                raise ConfigError(f"{name} = {getattr(self, name)} is below {bound}; raise it")
        for name in ("collision_share", "focus", "drift", "transition_share", "noise_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} = {getattr(self, name)} is no share; use 0 to 1")
        if self.transition_share + self.noise_share > 1:
            raise ConfigError(
                f"transition_share = {self.transition_share} and noise_share = {self.noise_share} "
                "exceed 1 together; what they leave is driven by taste"
            )
        if not self.level_size:
            growth = (self.num_items / 2000) ** (1 / 3)
            sizes = tuple(max(2, round(size * growth)) for size in (16, 32, 64))
            object.__setattr__(self, "level_size", sizes)
        room = int(np.prod(np.asarray(self.level_size, dtype=object)))
        if min(self.level_size) < 2 or max(self.level_size) > 2**15:
            raise ConfigError(f"level_size = {self.level_size} needs entries from 2 to {2**15}")
        if room < 2 * self.num_items:
            raise ConfigError(
                f"level_size = {self.level_size} has room for {room} semantic IDs, too few for "
                f"num_items = {self.num_items}; leave half of them free"
            )


@dataclass(frozen=True, kw_only=True)
class SyntheticWorld:
    """The items and what follows what."""

    params: WorldParams
    code: Int64[np.ndarray, "I L"]
    popularity: Float64[np.ndarray, " I"]
    """Sums to one."""
    next_items: Int64[np.ndarray, "I S"]

    @cached_property
    def order(self) -> Int64[np.ndarray, " I"]:
        """Items by semantic ID: those below any node are neighbours."""
        return np.lexsort(self.code.T[::-1])

    @cached_property
    def mass(self) -> Float64[np.ndarray, " I1"]:
        """Popularity of all items before each place of `order`."""
        return np.concatenate([[0.0], np.cumsum(self.popularity[self.order])])

    @cached_property
    def next_item_probs(self) -> Float64[np.ndarray, " S"]:
        """Chance of each successor, given that one follows."""
        share = 0.5 ** np.arange(self.params.successors)
        return share / share.sum()

    def node(self, depth: int) -> Int64[np.ndarray, " I"]:
        """The tree node of each item at a depth, numbered in the order of their codes."""
        _, node = np.unique(self.code[:, :depth], axis=0, return_inverse=True)
        return node.reshape(-1) if depth else np.zeros(len(self.code), dtype=np.int64)

    @cached_property
    def interest(self) -> Int64[np.ndarray, " I"]:
        """The taste that each item meets."""
        return self.node(max(1, self.code.shape[1] - 1))

    @cached_property
    def category(self) -> Int64[np.ndarray, " I"]:
        """The department that each item is in."""
        return self.node(max(1, self.code.shape[1] - 1) - 1)

    @cached_property
    def category_of_interest(self) -> Int64[np.ndarray, " N"]:
        """The department of each taste."""
        department = np.zeros(int(self.interest.max()) + 1, dtype=np.int64)
        department[self.interest] = self.category
        return department

    def draw(
        self,
        node_of_item: Int64[np.ndarray, " I"],
        node: Int64[np.ndarray, " R"],
        rng: np.random.Generator,
    ) -> Int64[np.ndarray, " R"]:
        """An item below each node, by popularity; `node_of_item` as `node` numbers them."""
        bound = np.searchsorted(node_of_item[self.order], [node, node + 1])
        low, high = self.mass[bound]
        place = np.searchsorted(self.mass, low + (high - low) * rng.random(len(node)), "right") - 1
        return self.order[np.clip(place, bound[0], bound[1] - 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Events:
    """All interactions; those of user u are `start[u] : start[u + 1]`, oldest first."""

    start: Int64[np.ndarray, " U1"]
    item: Int64[np.ndarray, " E"]
    timestamp: Int64[np.ndarray, " E"]
    """Seconds since 1970."""
    interest: Int64[np.ndarray, "E K"]
    """What the user liked at that moment."""


def make_world(params: WorldParams, rng: np.random.Generator) -> SyntheticWorld:
    """Items with their codes, popularity and successors."""
    code = _codes(params, rng)
    num_items = len(code)
    weight = (1.0 + rng.permutation(num_items)) ** -params.popularity_skew
    nothing = np.zeros((num_items, 0), dtype=np.int64)
    bare = SyntheticWorld(
        params=params, code=code, popularity=weight / weight.sum(), next_items=nothing
    )
    # Complements go from first code to first code, the same for all items of one: a rule that
    # codes can tell, and item identities only one by one.
    top = bare.node(1)
    cycle = rng.permutation(top.max() + 1)
    complement = np.empty_like(cycle)
    complement[cycle] = np.roll(cycle, -1)
    itself = np.arange(num_items)
    columns: list[Int64[np.ndarray, " I"]] = []
    for rank in range(params.successors):
        sequel = bare.draw(bare.interest, bare.interest, rng)
        other = bare.draw(bare.category, bare.category, rng)
        # Most small tastes would have an item follow itself; real shops see that in a few percent.
        sequel = np.where(sequel == itself, other, sequel)
        columns.append(sequel if rank % 2 == 0 else bare.draw(top, complement[top], rng))
    return replace(bare, next_items=np.stack(columns, axis=1))


def simulate_users(world: SyntheticWorld, rng: np.random.Generator) -> Events:
    """The lives of all users."""
    params = world.params
    extra = params.mean_events - params.min_events
    count = params.min_events - 1 + rng.geometric(1 / (1 + extra), params.num_users)
    start = ragged.starts(np.minimum(count, params.min_events + 10 * int(extra + 1)))
    count = np.diff(start)
    item = np.zeros(start[-1], dtype=np.int64)
    taste = np.zeros((start[-1], params.tastes_per_user), dtype=np.int64)
    held = _first_tastes(world, rng)
    for position in range(int(count.max())):
        user = np.flatnonzero(count > position)
        event = start[user] + position
        held[user] = _drifted(world, held[user], rng)
        taste[event] = held[user]
        # A first item has nothing to follow from: it is to the user's taste.
        kind = rng.random(len(user)) if position else np.ones(len(user))
        item[event] = _next(world, item[event - 1], held[user], kind, rng)
    stay_s = params.days * _DAY_S / 3
    gap = 1 + rng.exponential(stay_s / params.mean_events, len(item)).astype(np.int64)
    gap[start[:-1]] = _FIRST_DAY + rng.integers(params.days * _DAY_S, size=len(count))
    total = ragged.starts(gap)
    timestamp = total[1:] - total[start[ragged.owners(start)]]
    return Events(start=start, item=item, timestamp=timestamp, interest=taste)


def _codes(params: WorldParams, rng: np.random.Generator) -> Int64[np.ndarray, "I L"]:
    """Codes of all items: a ragged tree, few collisions, items in no particular order."""
    collided = round(params.collision_share * params.num_items)
    wanted = params.num_items - collided
    found = np.zeros((0, len(params.level_size)), dtype=np.int64)
    # A skewed tree runs out of likely leaves: each round spreads a little wider, so this ends.
    skew = params.fanout_skew
    while len(found) < wanted:
        fresh = np.concatenate([found, _descents(params, skew, 2 * params.num_items, rng)])
        _, first = np.unique(fresh, axis=0, return_index=True)
        found = fresh[np.sort(first)][:wanted]
        skew *= 0.8
    twins = found[rng.integers(wanted, size=collided)]
    return rng.permutation(np.concatenate([found, twins]))


def _descents(
    params: WorldParams, skew: float, num: int, rng: np.random.Generator
) -> Int64[np.ndarray, "R L"]:
    """Random walks from the root, every prefix with likely and unlikely codes of its own."""
    code = np.zeros((num, 0), dtype=np.int64)
    for level, size in enumerate(params.level_size):
        share = (1.0 + np.arange(size)) ** -skew
        rank = np.searchsorted(np.cumsum(share)[:-1] / share.sum(), rng.random(num), "right")
        # A prefix must prefer the same codes in every round: its favourite is computed from its
        # codes, with steps from a generator of the level's own.
        step = np.random.default_rng([params.seed, level]).integers(1, 1 << 30, level)
        start = (code * step).sum(axis=1)
        code = np.concatenate([code, ((rank + start) % size)[:, None]], axis=1)
    return code


def _first_tastes(world: SyntheticWorld, rng: np.random.Generator) -> Int64[np.ndarray, "U K"]:
    """Popular tastes are held by many; the tastes of one user are often of one department."""
    shape = (world.params.num_users, world.params.tastes_per_user)
    everything = np.zeros(len(world.code), dtype=np.int64)
    item = world.draw(everything, np.zeros(shape[0] * shape[1], dtype=np.int64), rng)
    taste = world.interest[item].reshape(shape)
    near = world.draw(
        world.category, world.category_of_interest[np.repeat(taste[:, 0], shape[1])], rng
    )
    related = rng.random(shape) < world.params.focus / 2
    return np.where(related, world.interest[near].reshape(shape), taste)


def _drifted(
    world: SyntheticWorld, held: Int64[np.ndarray, "R K"], rng: np.random.Generator
) -> Int64[np.ndarray, "R K"]:
    """Now and then one taste gives way to another of its department."""
    rows = np.flatnonzero(rng.random(len(held)) < world.params.drift)
    slot = rng.integers(held.shape[1], size=len(held))
    after = held.copy()
    room = world.category_of_interest[held[rows, slot[rows]]]
    after[rows, slot[rows]] = world.interest[world.draw(world.category, room, rng)]
    return after


def _next(
    world: SyntheticWorld,
    last: Int64[np.ndarray, " R"],
    held: Int64[np.ndarray, "R K"],
    kind: Float64[np.ndarray, " R"],
    rng: np.random.Generator,
) -> Int64[np.ndarray, " R"]:
    """The next item of each user; `kind` in [0, 1] decides what it follows from."""
    params, num = world.params, len(last)
    rank = rng.choice(params.successors, size=num, p=world.next_item_probs)
    taste = held[np.arange(num), rng.integers(held.shape[1], size=num)]
    narrow = world.draw(world.interest, taste, rng)
    wide = world.draw(world.category, world.category_of_interest[taste], rng)
    liked = np.where(rng.random(num) < params.focus, narrow, wide)
    anything = rng.choice(len(world.popularity), size=num, p=world.popularity)
    driven = kind >= params.transition_share + params.noise_share
    follows = kind < params.transition_share
    return np.where(driven, liked, np.where(follows, world.next_items[last, rank], anything))
