"""Users of a synthetic world, who click and buy by tastes that its log only hints at.

A user looks at a list as the click model says, and is attracted by an item with probability

    relevance * appeal     relevance: the item is of one of the user's tastes, only of its category,
                           a successor of the last item, or neither (the largest that applies)
                           appeal: of the item's taste node times that of the item

A click is followed by a purchase with the item's *quality*. Appeal and quality are in no history:
only responses to shown items reveal them. Tastes drift once a window, by the rule of the world.
A share of the items, those that the log knows least of, is released later; until then nobody is
interested in them.

Every draw is a function of seed, window and user
(docs/decisions/0002-randomness-is-a-function.md).

Shapes:  I items   U users   K tastes of a user   R visits   M shown items   P ranks of the longest
         list   S successors   T taste nodes
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float64, Int64

from orchard import ragged
from orchard.data.importers.card import CARD
from orchard.data.synthetic_world import (
    Events,
    SyntheticWorld,
    WorldParams,
    drifted,
    make_world,
    simulate_users,
)
from orchard.errors import ConfigError, DataError
from orchard.feedback.schema import EVENTS
from orchard.simulation.click_models import ClickModel, PositionBased
from orchard.simulation.simulator import BUY, CLICK, LOOK_S, ShownLists, Visits

_VISIT, _TIME, _DRIFT, _LOOK, _LIKE, _BUY, _ITEM, _RELEASE = range(8)
"""Streams of random numbers; with seed and window they key a generator."""


@dataclass(frozen=True, kw_only=True)
class UserParams:
    """Parameters of the users of a world."""

    seed: int = 0
    requests: int = 500
    """Visits per window, each of another user."""
    window_s: float = 3600.0
    """Length of a window in seconds."""
    start: float = 1.7e9
    """Time at which the first window begins, in seconds since 1970."""
    taste: float = 0.8
    """Relevance of an item of one of the user's tastes."""
    category: float = 0.3
    """Relevance of an item only of the category of a taste."""
    successor: float = 0.5
    """Relevance of a successor of the user's last item."""
    noise: float = 0.02
    """Relevance of every other item."""
    min_appeal: float = 0.1
    """Smallest appeal of a taste node; the largest is 1."""
    buy_value: float = 2.0
    """Value of a purchase; that of a click is 1."""
    drift: float | None = None
    """Probability that a taste of a user changes between two windows; by default the world's."""
    released_later: float = 0.1
    """Share of the items that are released after the first window."""
    release_windows: int = 10
    """Number of windows over which those items are released."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a value out of bounds."""
        shares = ("taste", "category", "successor", "noise", "min_appeal", "released_later")
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} = {getattr(self, name)} is not a share; use 0 to 1")
        for name in ("requests", "window_s", "release_windows"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} = {getattr(self, name)} is not positive; raise it")


@dataclass(kw_only=True)
class SyntheticUsers:
    """Simulator of the users of a synthetic world; see `orchard.simulation.simulator`."""

    params: UserParams
    world: SyntheticWorld
    click_model: ClickModel = field(default_factory=PositionBased)
    history: list[list[int]] = field(default_factory=list[list[int]])
    """Items of each user so far, oldest first."""
    first_tastes: Int64[np.ndarray, "U K"]
    """Tastes in window 0."""

    def __post_init__(self) -> None:
        """Draw what is hidden of the items."""
        params, num_items = self.params, len(self.world.code)
        if params.requests > len(self.history):
            raise ConfigError(
                f"{params.requests} visits in a window need as many users; the world has "
                f"{len(self.history)}"
            )
        rng = self._rng(0, _ITEM)
        num_tastes = int(self.world.interest.max()) + 1
        node_appeal = params.min_appeal + (1 - params.min_appeal) * rng.random(num_tastes)
        self.appeal: Float64[np.ndarray, " I"] = node_appeal[self.world.interest] * (
            0.5 + 0.5 * rng.random(num_items)
        )
        self.quality: Float64[np.ndarray, " I"] = rng.random(num_items)
        rng = self._rng(0, _RELEASE)
        place = np.empty(num_items, dtype=np.int64)
        place[np.argsort(self.world.popularity, kind="stable")] = np.arange(num_items)
        later = place < round(params.released_later * num_items)
        window = rng.integers(1, params.release_windows + 1, num_items)
        self.release: Int64[np.ndarray, " I"] = np.where(later, window, 0)
        """Window from which on users are interested in each item."""
        self._tastes: list[Int64[np.ndarray, "U K"]] = [self.first_tastes]

    @property
    def value(self) -> Float64[np.ndarray, " I"]:
        """Expected value of a click on each item, a purchase included."""
        return 1.0 + self.params.buy_value * self.quality

    def tastes(self, window: int) -> Int64[np.ndarray, "U K"]:
        """Return the tastes of all users in a window."""
        params = self.world.params
        share = params.drift if self.params.drift is None else self.params.drift
        while len(self._tastes) <= window:
            rng = self._rng(len(self._tastes), _DRIFT)
            self._tastes.append(drifted(self.world, self._tastes[-1], rng, share))
        return self._tastes[window]

    def visits(self, window: int) -> Visits:
        """Return who visits in a window; see `Simulator`."""
        params = self.params
        user = self._rng(window, _VISIT).permutation(len(self.history))[: params.requests]
        offset = np.sort(self._rng(window, _TIME).random(params.requests))
        histories = [self.history[index] for index in user]
        return Visits(
            window=window,
            user=user,
            time=params.start + params.window_s * (window + offset),
            history=np.array([item for each in histories for item in each], dtype=np.int64),
            history_start=ragged.starts(np.array([len(each) for each in histories])),
        )

    def respond(self, visits: Visits, shown: ShownLists) -> pl.DataFrame:
        """Return clicks and purchases, which follow the visit by `LOOK_S` per rank."""
        attraction, group, item = self._shown(visits, shown)
        users, ranks = len(self.history), attraction.shape[1]
        # [R, P] uniform numbers of each visiting user and rank; a function of window and user
        look, like, buy = (
            self._rng(visits.window, stream).random((users, max(ranks, 1)))[visits.user, :ranks]
            for stream in (_LOOK, _LIKE, _BUY)
        )
        clicked = self.click_model.clicks(attraction, group, look, like)
        bought = clicked & (buy < self.quality[item])
        behaviors = ((CLICK, clicked, 1.0), (BUY, bought, self.params.buy_value))
        rows = [
            {
                "event_id": f"{shown.request_id[visit]}-{rank}-{behavior}",
                "time": float(visits.time[visit]) + LOOK_S * (rank + 1),
                "request_id": shown.request_id[visit],
                "user": str(visits.user[visit]),
                "item_id": int(item[visit, rank]),
                "behavior": behavior,
                "value": value,
            }
            for behavior, happened, value in behaviors
            for visit, rank in np.argwhere(happened).tolist()
        ]
        return pl.DataFrame(rows, schema=EVENTS).sort("time", "event_id")

    def remember(self, events: pl.DataFrame) -> None:
        """Append the clicked items to the histories of their users."""
        clicks = events.filter(pl.col("behavior") == CLICK)
        for user, item in zip(clicks["user"], clicks["item_id"], strict=True):
            self.history[int(user)].append(int(item))

    def expected_reward(self, visits: Visits, shown: ShownLists) -> Float64[np.ndarray, " R"]:
        """Return the expected value of each visit's events, in closed form."""
        attraction, group, item = self._shown(visits, shown)
        return (self.click_model.probability(attraction, group) * self.value[item]).sum(axis=1)

    def attraction(
        self, visits: Visits, row: Int64[np.ndarray, " M"], item: Int64[np.ndarray, " M"]
    ) -> Float64[np.ndarray, " M"]:
        """Return the probability that visit `row` clicks an item that it looks at."""
        params, world = self.params, self.world
        taste = self.tastes(visits.window)[visits.user][row]
        has_last = np.diff(visits.history_start)[row] > 0
        last = np.where(has_last, visits.history[visits.history_start[row + 1] - 1], 0)
        follows = has_last & (world.next_items[last] == item[:, None]).any(axis=1)
        of_taste = (taste == world.interest[item][:, None]).any(axis=1)
        category = world.category_of_interest[taste]
        of_category = (category == world.category[item][:, None]).any(axis=1)
        relevance = np.full(len(item), params.noise)
        for applies, value in (
            (of_category, params.category), (follows, params.successor), (of_taste, params.taste),
        ):  # fmt: skip
            relevance = np.where(applies, np.maximum(relevance, value), relevance)
        is_out = self.release[item] <= visits.window
        return np.where(is_out, relevance * self.appeal[item], 0.0)

    def all_rewards(self, visits: Visits) -> Float64[np.ndarray, "R I"]:
        """Return the expected reward of showing each item alone to each visit."""
        num_items = len(self.world.code)
        row = np.repeat(np.arange(len(visits)), num_items)
        item = np.tile(np.arange(num_items), len(visits))
        looked_at = self.click_model.probability(np.ones((1, 1)), np.zeros((1, 1), np.int64))[0, 0]
        attraction = self.attraction(visits, row, item).reshape(len(visits), num_items)
        return looked_at * attraction * self.value

    def best_lists(self, visits: Visits, k: int) -> ShownLists:
        """Return the k items of the largest expected reward alone, for each visit.

        The list is the best of all for the position-based model, and for k = 1 for every model.
        """
        best = np.argsort(-self.all_rewards(visits), axis=1, kind="stable")[:, :k]
        return ShownLists(
            request_id=tuple(f"oracle-{visit}" for visit in range(len(visits))),
            item=best.reshape(-1),
            start=np.arange(len(visits) + 1) * best.shape[1],
        )

    def _shown(
        self, visits: Visits, shown: ShownLists
    ) -> tuple[Float64[np.ndarray, "R P"], Int64[np.ndarray, "R P"], Int64[np.ndarray, "R P"]]:
        """Return attraction, group (taste node) and item of every rank; past the end they are 0.

        Raises:
            DataError: an item is none of the world.
        """
        num_items = len(self.world.code)
        foreign = (shown.item < 0) | (shown.item >= num_items)
        if foreign.any():
            raise DataError(
                f"item {shown.item[foreign][0]} was shown, which the world of {num_items} items "
                "lacks; serve a policy of the world's own catalog"
            )
        attraction = self.attraction(visits, ragged.row_of(shown.start), shown.item)
        return (
            ragged.pad(attraction, shown.start, fill=0),
            ragged.pad(self.world.interest[shown.item], shown.start, fill=0),
            ragged.pad(shown.item, shown.start, fill=0),
        )

    def _rng(self, window: int, stream: int) -> np.random.Generator:
        """Return the generator of one stream in one window."""
        return np.random.default_rng([self.params.seed, window, stream])


def users_of_world(
    world_params: WorldParams, params: UserParams, click_model: ClickModel | None = None
) -> SyntheticUsers:
    """Create the users of the world with these parameters, as they are at the end of its log."""
    world_rng, user_rng = np.random.default_rng(world_params.seed).spawn(2)
    world = make_world(world_params, world_rng)
    log: Events = simulate_users(world, user_rng)
    return SyntheticUsers(
        params=params,
        world=world,
        click_model=click_model or PositionBased(),
        history=[each.tolist() for each in np.split(log.item, log.start[1:-1])],
        first_tastes=log.interest[log.start[1:] - 1],
    )


def users_of_folder(
    folder: Path, params: UserParams, click_model: ClickModel | None = None
) -> SyntheticUsers:
    """Create the users of the data set in a folder, which `orchard data synthetic` wrote.

    Raises:
        DataError: the folder holds no synthetic world, or its card cannot be read.
    """
    try:
        tree: dict[str, Any] = json.loads((folder / CARD).read_text(encoding="utf-8"))["params"]
        tree["level_size"] = tuple(tree["level_size"])
        world_params = WorldParams(**tree)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{folder / CARD} does not describe a synthetic world; give the folder that "
            "`orchard data synthetic` wrote"
        ) from error
    return users_of_world(world_params, params, click_model)
