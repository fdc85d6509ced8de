"""Training rows divided into those of the warm start and fresh ones."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchard import config, ragged
from orchard.catalog.catalog import from_codes
from orchard.data.fresh import concatenate, hold_back, read_training_rows, take
from orchard.data.prompts import Split, make_windows, read_split
from orchard.errors import ConfigError, DataError
from orchard.settings import DataConfig

ITEMS = from_codes([[i // 4, i % 4] for i in range(16)])


def lives(*lengths: int) -> Split:
    """Users with as many rows each, whose histories grow by one item a row."""
    rows = [(user, list(range(n + 1)), n + 1) for user, m in enumerate(lengths) for n in range(m)]
    return Split(
        user=np.array([user for user, _, _ in rows]),
        history=np.array([item for _, history, _ in rows for item in history]),
        history_start=ragged.starts(np.array([len(history) for _, history, _ in rows])),
        target=np.array([target for _, _, target in rows]),
        digest="abc",
    )


def write(path: Path, users: list[int] | list[str], items: list[int]) -> None:
    table = {"user_id": users, "history": [[i] for i in items], "target": items}
    pq.write_table(pa.table(table), path)


def test_each_user_gives_its_last_rows_and_keeps_one() -> None:
    kept, held = hold_back(lives(1, 4, 2, 10), 0.3, by="user")
    assert np.bincount(kept.user).tolist() == [1, 3, 1, 7]
    assert np.bincount(held.user, minlength=4).tolist() == [0, 1, 1, 3]
    for user in (1, 2, 3):  # targets grow with time
        assert kept.target[kept.user == user].max() < held.target[held.user == user].min()
    _, most = hold_back(lives(1, 4), 0.99, by="user")
    assert most.user.tolist() == [1, 1, 1]


def test_the_last_rows_of_the_files_are_held_back_in_order() -> None:
    split = lives(3, 2)
    kept, held = hold_back(split, 0.4, by="row")
    assert kept.user.tolist() == [0, 0, 0]
    assert held.user.tolist() == [1, 1]
    assert held.row is not None
    assert held.row.tolist() == [3, 4]
    assert held.history[: held.history_start[1]].tolist() == [0]
    assert len({split.digest, kept.digest, held.digest}) == 3
    assert hold_back(split, 0.4, by="row")[0].digest == kept.digest
    assert hold_back(split, 0.2, by="row")[0].digest != kept.digest


@pytest.mark.parametrize(
    ("lengths", "share", "by", "says"),
    [
        ((1, 1, 1), 0.9, "user", "holds back 0 of 3 .*raise it.*data.hold_back_by"),
        ((3,), 0.01, "row", "holds back 0 of 3 .*raise it"),
        ((2,), 0.99, "row", "holds back 2 of 2 .*lower it"),
    ],
)
def test_an_empty_side_is_refused(
    lengths: tuple[int, ...], share: float, by: str, says: str
) -> None:
    with pytest.raises(DataError, match=says) as refused:
        hold_back(lives(*lengths), share, by=by)  # type: ignore[arg-type]
    assert refused.value.code == "data.empty_hold_back"


def test_fresh_files_share_users_with_the_training_files(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", ["ann", "bob"], [1, 2])
    write(tmp_path / "later.parquet", ["cid", "ann"], [3, 4])
    data = DataConfig(path=tmp_path, fresh=("later.parquet",))
    train, fresh = read_training_rows(data, ITEMS)
    assert fresh is not None
    assert fresh.target.tolist() == [3, 4]
    assert train.user[0] == fresh.user[1]
    assert fresh.user[0] not in train.user
    alone = read_split([tmp_path / "train.parquet"], ITEMS, max_history=10)
    assert train.digest == alone.digest
    both = concatenate(train, fresh)
    assert both.target.tolist() == [1, 2, 3, 4]
    assert both.history_start.tolist() == [0, 1, 2, 3, 4]
    assert concatenate(train, None) is train


def test_without_settings_there_are_no_fresh_rows(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [1, 2], [1, 2])
    train, fresh = read_training_rows(DataConfig(path=tmp_path), ITEMS)
    assert fresh is None
    assert train.row is None
    assert not DataConfig(path=tmp_path).has_fresh


def test_fresh_files_with_other_items_are_named(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [1], [1])
    write(tmp_path / "later.parquet", [1], [99])
    data = DataConfig(path=tmp_path, fresh=("later.parquet",))
    with pytest.raises(DataError, match="later.parquet: item 99 is not in the catalog") as refused:
        read_training_rows(data, ITEMS)
    assert refused.value.code == "data.unknown_item"


@pytest.mark.parametrize(
    ("code", "overrides"),
    [
        ("two_sources_of_fresh_rows", ["data.fresh=['a.parquet']", "data.hold_back=0.2"]),
        ("no_fresh_rows", ["sft.rows=fresh"]),
        ("no_fresh_rows", ["learner.rows=fresh"]),
    ],
)
def test_contradictions_are_refused(code: str, overrides: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        config.parse({"name": "toy", "data": {"path": "somewhere"}}, overrides)
    assert refused.value.code == f"config.{code}"


@pytest.mark.parametrize("max_history", [1, 2, 5, 20])
def test_windows_of_fresh_rows_train_their_targets_alone(max_history: int) -> None:
    _, held = hold_back(lives(3, 9, 6, 1), 0.5, by="user")
    short, start = ragged.last(held.history, held.history_start, max_history)
    split = Split(user=held.user, history=short, history_start=start, target=held.target)
    windows = make_windows(split, max_history=max_history, targets_only=True)
    trained = ragged.index_in_row(windows.start) >= windows.fresh[ragged.row_of(windows.start)]
    assert sorted(windows.item[trained]) == sorted(held.target)
    assert np.diff(windows.start).max() <= max_history + 1


def test_taken_rows_remember_their_place() -> None:
    rows = take(take(lives(5), np.array([1, 3, 4])), np.array([0, 2]))
    assert rows.row is not None
    assert rows.row.tolist() == [1, 4]
