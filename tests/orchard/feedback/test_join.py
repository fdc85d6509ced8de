"""Every exposure becomes a row, every event is attributed or counted by its reason."""

import numpy as np
import polars as pl
import pytest

from orchard.catalog import catalog as catalogs
from orchard.errors import ConfigError, DataError
from orchard.feedback.join import JoinOptions, join
from orchard.feedback.schema import FEEDBACK
from tests.orchard.feedback.conftest import Table


def test_exposures_without_events_are_zeros(exposures: Table, events: Table) -> None:
    shown = exposures([{"item_id": 5}, {"item_id": 6, "rank": 2}, {"request_id": "s"}])
    joined = join(shown, events([{}]))
    assert joined.rows.schema == FEEDBACK
    assert joined.rows["reward"].to_list() == [1.0, 0.0, 0.0]
    assert joined.rows["behaviors"].to_list() == [["click"], [], []]
    assert joined.summary["rows"] == joined.summary["exposures"] == 3
    assert joined.summary["attributed"] == joined.summary["with_reward"] == 1


def test_events_that_belong_to_nothing_are_counted_by_their_reason(
    exposures: Table, events: Table
) -> None:
    shown = exposures([{"user": "u"}, {"request_id": "s", "user": "u", "item_id": 6}])
    joined = join(
        shown,
        events(
            [
                {"request_id": "never"},
                {"item_id": 6},  # shown, but not in this request
                {"request_id": None, "user": "u", "item_id": 7},
                {"request_id": None, "user": "stranger"},
                {"request_id": None, "user": None},
                {"item_id": None},
                {"time": float("nan")},
                {"time": 1000.0 + 3601},
                {"time": 1000.0 - 61},
            ]
        ),
    )
    found = {name: joined.summary[name] for name in ("unknown_request", "unknown_item", "late")}
    assert found == {"unknown_request": 1, "unknown_item": 2, "late": 1}
    assert joined.summary["unknown_user"] == joined.summary["early"] == 1
    assert joined.summary["incomplete"] == 3
    assert joined.summary["attributed"] == 0
    assert joined.rows["reward"].sum() == 0


def test_an_event_of_a_user_belongs_to_the_latest_exposure_before_it(
    exposures: Table, events: Table
) -> None:
    shown = exposures(
        [
            {"request_id": name, "user": "u", "time": time}
            for name, time in (("late", 3000.0), ("first", 1000.0), ("second", 2000.0))
        ]
    )
    joined = join(shown, events([{"request_id": None, "user": "u", "time": 2500.0}]))
    assert dict(zip(joined.rows["request_id"], joined.rows["reward"], strict=True)) == {
        "late": 0.0, "first": 0.0, "second": 1.0,
    }  # fmt: skip


def test_a_request_that_was_answered_twice_has_two_exposures(
    exposures: Table, events: Table
) -> None:
    shown = exposures([{"time": 1000.0}, {"time": 1500.0}])
    joined = join(shown, events([{"time": 1010.0}, {"time": 1510.0, "behavior": "buy"}]))
    assert joined.rows["behaviors"].to_list() == [["click"], ["buy"]]


def test_duplicates_are_dropped_by_id_or_by_all_columns(exposures: Table, events: Table) -> None:
    rows = [
        {"event_id": "a", "time": 1010.0},
        {"event_id": "a", "time": 1020.0},  # sent again with another time
        {"time": 1030.0},
        {"time": 1030.0},
        {"time": 1031.0},
    ]
    joined = join(exposures([{}]), events(rows), JoinOptions(repeats="all"))
    assert joined.summary["duplicates"] == 2
    assert joined.rows["reward"].to_list() == [3.0]
    once = join(exposures([{}]), events(rows))
    assert once.rows["reward"].to_list() == [1.0]
    assert once.summary["repeats"] == 2


@pytest.mark.parametrize(("combine", "reward"), [("sum", 1.1), ("max", 1.0), ("last", 0.1)])
def test_values_of_several_behaviors_are_combined(
    exposures: Table, events: Table, combine: str, reward: float
) -> None:
    seen = events(
        [
            {"behavior": "buy", "time": 1010.0},
            {"behavior": "click", "time": 1020.0},
            {"behavior": "view", "time": 1030.0},
        ]
    )
    options = JoinOptions(values={"buy": 1.0, "click": 0.1}, combine=combine)  # type: ignore[arg-type]
    joined = join(exposures([{}]), seen, options)
    assert joined.rows["reward"].to_list() == pytest.approx([reward])
    assert joined.rows["behaviors"].to_list() == [["buy", "click", "view"]]
    assert joined.summary["without_value"] == 1


@pytest.mark.parametrize(
    ("how", "reward", "weight"), [("last", -1.0, 1.0), ("combine", 1.0, 1.0), ("drop", 1.0, 0.0)]
)
def test_contradicting_events_are_counted_and_decided(
    exposures: Table, events: Table, how: str, reward: float, weight: float
) -> None:
    seen = events([{"behavior": "like", "time": 1010.0}, {"behavior": "dislike", "time": 1020.0}])
    options = JoinOptions(values={"like": 2.0, "dislike": -1.0}, contradictions=how)  # type: ignore[arg-type]
    joined = join(exposures([{}]), seen, options)
    assert joined.rows.select("reward", "weight").row(0) == (reward, weight)
    assert joined.summary["contradictory"] == 1


def test_clocks_that_differ_by_minutes_are_named(exposures: Table, events: Table) -> None:
    shown = exposures([{"request_id": str(n), "time": 1000.0 * n} for n in range(1, 11)])
    behind = events([{"request_id": str(n), "time": 1000.0 * n - 170} for n in range(1, 11)])
    joined = join(shown, behind)
    assert joined.summary["early"] == 10
    assert joined.rows["reward"].sum() == 0
    (warning,) = joined.warnings
    assert "--clock-offset 170" in warning
    moved = join(shown, behind, JoinOptions(clock_offset=170.0))
    assert moved.rows["reward"].sum() == 10
    assert not moved.warnings
    tolerant = join(shown, behind, JoinOptions(clock_tolerance=200.0))
    assert tolerant.rows["reward"].sum() == 10


def test_rewards_are_bounded_and_bad_values_refused_or_counted(
    exposures: Table, events: Table
) -> None:
    shown = exposures([{"item_id": item} for item in range(4)])
    seen = events([{"item_id": 0, "value": 1e9}, {"item_id": 1, "value": -1e9}])
    joined = join(shown, seen, JoinOptions(bound=10.0))
    assert joined.rows["reward"].to_list() == [10.0, -10.0, 0.0, 0.0]
    assert joined.summary["bounded"] == 2
    assert joined.summary["negative"] == 1
    bad = events([{"item_id": 2, "value": float("nan")}, {"item_id": 3, "value": float("inf")}])
    with pytest.raises(DataError, match="2 of 2 events .* not a finite number.*--bad-values drop"):
        join(shown, bad)
    dropped = join(shown, bad, JoinOptions(bad_values="drop"))
    assert dropped.summary["bad_values"] == 2
    assert dropped.rows["reward"].sum() == 0


def test_exposures_whose_window_is_open_may_wait(exposures: Table, events: Table) -> None:
    shown = exposures([{"request_id": "old", "time": 0.0}, {"request_id": "new", "time": 5000.0}])
    kept = join(shown, events([]), JoinOptions(lateness=100.0))
    assert (len(kept.rows), kept.summary["unsettled"]) == (2, 1)
    dropped = join(shown, events([]), JoinOptions(lateness=100.0, unsettled="drop"))
    assert dropped.rows["request_id"].to_list() == ["old"]


def test_items_are_mapped_to_the_catalog_that_is_given(exposures: Table, events: Table) -> None:
    catalog = catalogs.from_codes(
        [[0, 1, 2], [1, 0, 0]], item_id=np.array([5, 6]), level_size=(3, 3, 3)
    )
    shown = exposures(
        [
            {"item_id": 5, "catalogue": f"3-{catalog.digest[:8]}"},
            {"item_id": 6, "sid": [2, 2, 2]},
            {"item_id": 7},
        ]
    )
    joined = join(shown, events([{"item_id": 7}, {"item_id": 6}]), catalog=catalog)
    assert joined.rows["item_id"].to_list() == [5, 6]
    assert joined.rows["sid"].to_list() == [[0, 1, 2], [1, 0, 0]]
    assert joined.rows["logprob"].is_null().to_list() == [False, True]
    assert joined.rows["reward"].to_list() == [0.0, 1.0]
    names = ("unmapped", "other_catalog", "moved")
    assert [joined.summary[name] for name in names] == [1, 2, 1]


def test_without_exposures_there_is_no_feedback(exposures: Table, events: Table) -> None:
    with pytest.raises(DataError, match="nothing was shown") as error:
        join(exposures([]), events([{}]))
    assert error.value.code == "data.no_exposures"


def test_options_are_bounded() -> None:
    with pytest.raises(ConfigError, match="window = -1"):
        JoinOptions(window=-1.0)
    with pytest.raises(ConfigError, match="buy=nan is not finite"):
        JoinOptions(values={"buy": float("nan")})


def test_the_join_agrees_with_a_loop_over_events(exposures: Table, events: Table) -> None:
    rng = np.random.default_rng(0)
    shown = exposures(
        [
            {"request_id": f"r{n}", "time": float(n), "user": f"u{rng.integers(4)}",
             "item_id": int(rng.integers(6))}
            for n in rng.permutation(80)
        ]
    )  # fmt: skip
    seen = events(
        [
            {"event_id": str(n), "time": float(rng.uniform(-10, 90)),
             "request_id": f"r{rng.integers(90)}" if n % 2 else None,
             "user": f"u{rng.integers(5)}", "item_id": int(rng.integers(6))}
            for n in range(200)
        ]
    )  # fmt: skip
    options = JoinOptions(window=20.0, clock_tolerance=2.0, repeats="all")
    expected = np.zeros(len(shown))
    rows = list(shown.iter_rows(named=True))
    for event in seen.iter_rows(named=True):
        subject = "request_id" if event["request_id"] else "user"
        places = [
            (row["time"], place)
            for place, row in enumerate(rows)
            if row[subject] == event[subject] and row["item_id"] == event["item_id"]
        ]
        before = [place for place in places if place[0] <= event["time"]]
        chosen = max(before) if before else min(places, default=None)
        if chosen and -2 <= event["time"] - chosen[0] <= 20:
            expected[chosen[1]] += 1
    joined = join(shown, seen, options)
    assert joined.rows["reward"].to_list() == expected.tolist()
    assert expected.sum() > 20
    assert joined.rows["request_id"].to_list() == shown["request_id"].to_list()
    counted = ("attributed", "late", "early", "unknown_item", "unknown_request", "unknown_user")
    assert sum(joined.summary[name] for name in counted) == 200
    assert isinstance(joined.rows, pl.DataFrame)
