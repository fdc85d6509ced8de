"""Odd users, labels and ties are dropped, asked about or ordered by a rule, and counted."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchard.data.importers.examples import PARTS
from orchard.data.importers.read import ImportOptions, read
from orchard.data.importers.write import write
from orchard.errors import ConfigError, DataError

LOG = [(u, (u + e) % 6, 1_600_000_000 + 1000 * e + u) for u in range(9) for e in range(6)]
HEAD = "user_id,item_id,timestamp"


def table(path: Path, rows: list[Any], head: str = HEAD) -> Path:
    path.write_text("\n".join([head, *(",".join(map(str, row)) for row in rows)]))
    return path


def bring(folder: Path, source: Path, **choices: Any) -> Any:
    examples = read(source, None, ImportOptions(**choices), lambda count: None)
    return write(folder / "out", examples, source=source.name, overwrite=True)


def rows(folder: Path) -> list[list[Any]]:
    return [pq.read_table(folder / "out" / f"{part}.parquet").to_pylist() for part in PARTS]


@pytest.mark.parametrize("missing", ["nan", "NaN", "None", "null"])
def test_missing_users_are_dropped_and_counted(tmp_path: Path, missing: str) -> None:
    odd = [(missing, 1, 1_600_000_100), (missing, 2, 1_600_000_200)]
    facts = bring(tmp_path, table(tmp_path / "log.csv", [*LOG, *odd]))
    assert facts["events_without_user"] == 2
    assert (facts["num_events"], facts["num_users"]) == (len(LOG), 9)


def test_nan_of_data_frames_is_no_user(tmp_path: Path) -> None:
    user, item, time = (np.array(column) for column in zip(*LOG, strict=True))
    user = np.where(np.arange(len(user)) == 3, np.nan, user)
    columns = {"user_id": user, "item_id": item.astype(float), "timestamp": time}
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    facts = bring(tmp_path, tmp_path / "log.parquet")
    assert facts["events_without_user"] == 1
    assert not (tmp_path / "out" / "users.parquet").exists()  # integers, as in the source
    columns["user_id"] = np.where(np.arange(len(user)) % 2, np.nan, user)
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    with pytest.raises(DataError, match="27 of 54 rows of log.parquet have no user"):
        bring(tmp_path, tmp_path / "log.parquet")


def test_names_of_users_are_kept(tmp_path: Path) -> None:
    bring(
        tmp_path,
        table(
            tmp_path / "log.csv", [*LOG, ("guest", 1, 1_600_000_001), ("guest", 2, 1_600_000_002)]
        ),
    )
    users = {
        r["user_id"]: r["key"]
        for r in pq.read_table(tmp_path / "out" / "users.parquet").to_pylist()
    }
    assert sorted(users.values()) == sorted([*map(str, range(9)), "guest"])
    of_guest = [r for part in rows(tmp_path) for r in part if users[r["user_id"]] == "guest"]
    assert [(r["history"], r["target"]) for r in of_guest] == [([1], 2)]


def test_impressions_need_a_choice(tmp_path: Path) -> None:
    labeled = [(*row, int(n % 4 > 0)) for n, row in enumerate(LOG)]
    source = table(tmp_path / "log.csv", labeled, f"{HEAD},label")
    with pytest.raises(ConfigError, match=r"`label` of log.csv is 0 in 14 of 54 rows.*--labels"):
        bring(tmp_path, source)
    facts = bring(tmp_path, source, labels="positive")
    assert (facts["num_events"], facts["events_with_label_0"]) == (40, 14)
    assert bring(tmp_path, source, labels="all")["num_events"] == 54
    with pytest.raises(ConfigError, match="no column of labels"):
        bring(tmp_path, table(tmp_path / "plain.csv", LOG), labels="all")
    clicked = table(tmp_path / "c.csv", [(*row, "False") for row in LOG], f"{HEAD},seen")
    with pytest.raises(ConfigError, match="is 0 in 54 of 54 rows"):
        bring(tmp_path, clicked, columns={"label": "seen"})


def test_ties_are_counted_and_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    tied = [(u, i, t // 2000 * 2000) for u, i, t in LOG]
    facts = bring(tmp_path, table(tmp_path / "log.csv", tied))
    assert facts["events_at_the_time_of_the_users_event_before"] == sum(
        len(times) - len(set(times))
        for times in ([t for v, _, t in tied if v == u] for u in range(9))
    )
    first = rows(tmp_path)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(tied))
        bring(tmp_path, table(tmp_path / "log.csv", [tied[i] for i in order]))
        assert rows(tmp_path) == first


def test_units_that_mix_do_not_make_the_split(tmp_path: Path) -> None:
    bring(tmp_path, table(tmp_path / "log.csv", LOG))
    plain = [[(r["user_id"], r["target"]) for r in part] for part in rows(tmp_path)]
    mixed = [(u, i, t * (1000 if n % 2 else 1)) for n, (u, i, t) in enumerate(LOG)]
    facts = bring(tmp_path, table(tmp_path / "log.csv", mixed))
    assert (facts["times_in_seconds"], facts["times_in_milliseconds"]) == (27, 27)
    assert [[(r["user_id"], r["target"]) for r in part] for part in rows(tmp_path)] == plain
