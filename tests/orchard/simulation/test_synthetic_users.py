"""Users of a synthetic world: deterministic by seed, with expected rewards in closed form."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from orchard.data.synthetic import WorldParams, write_world
from orchard.errors import ConfigError, DataError
from orchard.simulation.click_models import click_model
from orchard.simulation.simulator import CLICK, ShownLists, Simulator, Visits, shown_lists
from orchard.simulation.synthetic_users import (
    SyntheticUsers,
    UserParams,
    users_of_folder,
    users_of_world,
)

WORLD = WorldParams(num_items=60, num_users=80, level_size=(4, 5, 6))
PARAMS = UserParams(requests=40, released_later=0.2, release_windows=4)


@cache
def made() -> SyntheticUsers:
    return users_of_world(WORLD, PARAMS)


def users(model: str = "position", **changes: float) -> SyntheticUsers:
    """Return new users of the one world that these tests share."""
    first = made()
    return SyntheticUsers(
        params=replace(PARAMS, **changes), world=first.world, click_model=click_model(model),
        history=[list(each) for each in first.history], first_tastes=first.first_tastes,
    )  # fmt: skip


def some_lists(visits: Visits, seed: int = 0) -> ShownLists:
    rng = np.random.default_rng(seed)
    lists = [rng.permutation(60)[: rng.integers(0, 6)].tolist() for _ in range(len(visits))]
    return shown_lists([f"r{number}" for number in range(len(visits))], lists)


def test_a_window_is_a_function_of_seed_and_events() -> None:
    one, two = users(), users()
    assert isinstance(one, Simulator)
    visits = one.visits(3)
    later = two.visits(5)  # the order in which windows are asked for does not matter
    np.testing.assert_array_equal(two.visits(3).history, visits.history)
    np.testing.assert_array_equal(one.tastes(5), two.tastes(5))
    np.testing.assert_array_equal(one.visits(5).user, later.user)
    shown = some_lists(visits)
    events = one.respond(visits, shown)
    assert events.equals(two.respond(two.visits(3), shown))
    assert len(events) > 0
    assert not events.equals(users(seed=1).respond(visits, shown))


def test_users_remember_what_they_clicked() -> None:
    simulator = users()
    visits = simulator.visits(0)
    events = simulator.respond(visits, some_lists(visits))
    before = [list(each) for each in simulator.history]
    simulator.remember(events)
    clicks = events.filter(events["behavior"] == CLICK)
    for user, history in enumerate(simulator.history):
        mine = clicks.filter(clicks["user"] == str(user))["item_id"].to_list()
        assert history == before[user] + mine


@pytest.mark.parametrize("model", ["position", "cascade", "satiation"])
def test_expected_reward_is_the_mean_over_responses(model: str) -> None:
    simulator = users(model)
    visits = simulator.visits(0)
    shown = some_lists(visits)
    expected = simulator.expected_reward(visits, shown)
    samples = np.zeros((40, len(visits)))
    for seed, sample in enumerate(samples):
        # Another seed draws other clicks; what is hidden of the items stays that of the first.
        other = users(model, seed=seed)
        other.appeal, other.quality, other.release = (
            simulator.appeal, simulator.quality, simulator.release,
        )  # fmt: skip
        events = other.respond(visits, shown)
        for request, value in zip(events["request_id"], events["value"], strict=True):
            sample[int(request[1:])] += value
    error = samples.std() / np.sqrt(samples.size)
    assert abs(samples.mean() - expected.mean()) < 5 * error
    assert np.corrcoef(samples.mean(axis=0), expected)[0, 1] > 0.8


def test_the_best_list_is_no_worse_than_any_other() -> None:
    simulator = users()
    visits = simulator.visits(0)
    best = simulator.expected_reward(visits, simulator.best_lists(visits, 5))
    for seed in range(5):
        assert (simulator.expected_reward(visits, some_lists(visits, seed)) <= best + 1e-12).all()
    alone = simulator.best_lists(visits, 1)
    np.testing.assert_allclose(
        simulator.expected_reward(visits, alone), simulator.all_rewards(visits).max(axis=1)
    )


def test_nobody_clicks_an_item_before_its_release() -> None:
    simulator = users()
    late = np.flatnonzero(simulator.release > 0)
    assert len(late) == 12
    visits = simulator.visits(0)
    shown = shown_lists([f"r{n}" for n in range(len(visits))], [late.tolist()] * len(visits))
    assert simulator.expected_reward(visits, shown).max() == 0
    assert len(simulator.respond(visits, shown)) == 0
    after = simulator.visits(int(simulator.release.max()))
    assert simulator.expected_reward(after, shown).min() > 0


def test_tastes_drift_by_the_settable_share() -> None:
    np.testing.assert_array_equal(users(drift=0.0).tastes(9), users().tastes(0))
    changed = (users(drift=1.0).tastes(1) != users().tastes(0)).any(axis=1).mean()
    assert changed > 0.2  # a taste may be drawn again


def test_users_are_read_from_the_folder_of_a_world(tmp_path: Path) -> None:
    write_world(tmp_path / "data", WORLD)
    read = users_of_folder(tmp_path / "data", PARAMS)
    assert read.history == users().history
    with pytest.raises(DataError, match="orchard data synthetic"):
        users_of_folder(tmp_path, PARAMS)


def test_refusals_say_what_to_change() -> None:
    with pytest.raises(ConfigError, match="the world has 80"):
        users(requests=81)
    with pytest.raises(ConfigError, match="taste = 2"):
        UserParams(taste=2.0)
    simulator = users()
    visits = simulator.visits(0)
    foreign = shown_lists(["r"] * len(visits), [[60]] * len(visits))
    with pytest.raises(DataError, match="item 60"):
        simulator.respond(visits, foreign)
