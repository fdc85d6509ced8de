"""A synthetic world is what it says it is, and has something to teach."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchard.catalog import catalog as catalogs
from orchard.data.prompts import read_split
from orchard.data.synthetic import CARD, WorldCard, likelihood, titles, write_world
from orchard.data.synthetic_world import WorldParams, make_world, simulate_users
from orchard.errors import ConfigError, DataError

SMALL = WorldParams(num_items=200, num_users=300)
PARTS = ("train", "valid", "test")
FILES = ("items.parquet", "train.parquet", "valid.parquet", "test.parquet", CARD)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, WorldCard]:
    folder = tmp_path_factory.mktemp("worlds") / "small"
    return folder, write_world(folder, SMALL)


def rows_of(folder: Path, *parts: str) -> list[dict[str, Any]]:
    return [row for part in parts for row in pq.read_table(folder / f"{part}.parquet").to_pylist()]


def test_equal_parameters_give_equal_bytes_and_other_seeds_another_world(
    small: tuple[Path, WorldCard], tmp_path: Path
) -> None:
    write_world(tmp_path / "again", SMALL)
    write_world(tmp_path / "other", replace(SMALL, seed=1))
    for name in FILES:
        first = (small[0] / name).read_bytes()
        assert (tmp_path / "again" / name).read_bytes() == first
        assert (tmp_path / "other" / name).read_bytes() != first


def test_the_files_have_the_schema_of_real_data_sets(small: tuple[Path, WorldCard]) -> None:
    folder, _ = small
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    items = pq.read_schema(folder / "items.parquet")
    assert items.names == ["item_id", "title", "sid", "sid_text"]
    types = [str(items.field(name).type) for name in items.names]
    assert types == ["int32", "string", "list<element: int16>", "string"]
    for part in PARTS:
        rows = pq.read_schema(folder / f"{part}.parquet")
        assert rows.names == ["user_id", "history", "target", "timestamp"]
        types = [str(rows.field(name).type) for name in rows.names]
        assert types == ["int32", "list<element: int32>", "int32", "int64"]


def test_a_catalog_and_prompts_are_made_of_it(small: tuple[Path, WorldCard]) -> None:
    folder, card = small
    items = catalogs.read(folder / "items.parquet")
    assert len(items) == card.facts["num_items"] == 200
    assert items.trie.num_leaves == card.facts["num_sids"] == 198  # 1 % collide
    for part in PARTS:
        split = read_split([folder / f"{part}.parquet"], items, max_history=SMALL.max_history)
        assert len(split) == card.facts[f"{part}_rows"]
        assert len(split.history) == sum(len(r["history"]) for r in rows_of(folder, part))


def test_time_alone_divides_the_parts(small: tuple[Path, WorldCard]) -> None:
    folder, _ = small
    times = [[row["timestamp"] for row in rows_of(folder, part)] for part in PARTS]
    joined = [when for part in times for when in part]
    assert joined == sorted(joined)
    total = len(joined)
    assert [len(part) for part in times] == [
        int(total * 0.8),
        int(total * 0.9) - int(total * 0.8),
        total - int(total * 0.9),
    ]


def test_a_history_is_what_its_user_did_before(small: tuple[Path, WorldCard]) -> None:
    done: dict[int, list[int]] = {}
    for row in rows_of(small[0], *PARTS):
        history = row["history"]
        assert 1 <= len(history) <= SMALL.max_history
        past = done.setdefault(row["user_id"], list(history))
        assert past[-SMALL.max_history :] == history
        past.append(row["target"])
    assert len(done) == SMALL.num_users


def test_titles_are_distinct_and_spell_the_codes(small: tuple[Path, WorldCard]) -> None:
    items = pq.read_table(small[0] / "items.parquet").to_pylist()
    assert len({item["title"] for item in items}) == len(items)
    for item in items:
        letters = "".join(f"<{'abc'[i]}_{code}>" for i, code in enumerate(item["sid"]))
        assert item["sid_text"] == letters
    assert titles(np.asarray([[0, 0, 0], [0, 0, 1], [1, 0, 0], [0, 0, 0]])) == [
        "Folding Brass Lamp",
        "Compact Brass Lamp",
        "Folding Brass Kettle",
        "Folding Brass Lamp No. 2",
    ]


def test_there_is_more_to_learn_than_popularity_and_than_pairs(
    small: tuple[Path, WorldCard],
) -> None:
    oracle, pairs, popularity = (
        small[1].yardsticks[name]["ndcg@10/sid"] for name in ("oracle", "transitions", "popularity")
    )
    assert oracle.low > pairs.high
    assert pairs.low > popularity.high


def test_the_card_on_disk_is_the_card_returned(small: tuple[Path, WorldCard]) -> None:
    folder, card = small
    written = json.loads((folder / CARD).read_text())
    assert written["facts"] == dict(card.facts)
    assert written["params"]["num_users"] == 300
    assert written["params"]["level_size"] == list(card.params.level_size)
    oracle = written["yardsticks"]["oracle"]["ndcg@10/sid"]
    assert oracle["mean"] == card.yardsticks["oracle"]["ndcg@10/sid"].mean


@settings(max_examples=15)
@given(
    seed=st.integers(0, 99),
    level_size=st.sampled_from([(), (90,), (8, 12), (4, 5, 6), (2, 3, 4, 5)]),
    tastes=st.integers(1, 4),
)
def test_the_oracle_deals_in_chances(seed: int, level_size: tuple[int, ...], tastes: int) -> None:
    params = WorldParams(
        seed=seed, num_items=40, num_users=12, level_size=level_size, tastes_per_user=tastes
    )
    rng = np.random.default_rng(seed)
    world = make_world(params, rng)
    events = simulate_users(world, rng)
    chance = likelihood(world, events.item[:-1], events.interest[1:])
    np.testing.assert_allclose(chance.sum(axis=1), 1.0, rtol=1e-12)
    later = np.setdiff1d(np.arange(1, len(events.item)), events.start)
    assert (chance[later - 1, events.item[later]] > 0).all()


def test_the_oracle_knows_how_often_its_guesses_come_true() -> None:
    params = replace(SMALL, num_users=3000)
    rng = np.random.default_rng(0)
    world = make_world(params, rng)
    events = simulate_users(world, rng)
    later = np.setdiff1d(np.arange(1, len(events.item)), events.start)
    chance = likelihood(world, events.item[later - 1], events.interest[later])
    best = chance.argmax(axis=1)
    came = (best == events.item[later]).mean()
    # 20,000 events: the share of hits is known to about 0.003.
    assert came == pytest.approx(chance[np.arange(len(best)), best].mean(), abs=0.012)


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    tiny = WorldParams(num_items=20, num_users=10)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(DataError, match="is not a synthetic world; choose another folder"):
            write_world(tmp_path / "thesis", tiny, overwrite=overwrite)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    write_world(tmp_path / "empty", tiny)
    with pytest.raises(DataError, match="holds a synthetic world already"):
        write_world(tmp_path / "empty", tiny)
    card = write_world(tmp_path / "empty", replace(tiny, num_users=11), overwrite=True)
    assert json.loads((tmp_path / "empty" / CARD).read_text())["facts"] == dict(card.facts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "thesis"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_items": 3}, "num_items = 3 is below 10"),
        ({"mean_events": 2.0}, "mean_events = 2.0 is below 5"),
        ({"drift": 1.5}, "drift = 1.5 is not a share"),
        ({"transition_share": 0.7, "noise_share": 0.4}, "exceed 1 together"),
        ({"level_size": (4, 4)}, "room for 16 semantic IDs, too few for num_items = 2000"),
        ({"level_size": (1, 40000)}, "entries from 2 to 32768"),
    ],
)
def test_an_impossible_world_is_refused_with_the_bound(
    changes: dict[str, float | tuple[int, ...]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(WorldParams(), **{"level_size": (), **changes})
