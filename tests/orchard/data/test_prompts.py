from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchard import ragged
from orchard.catalog.catalog import from_codes
from orchard.data.fresh import concatenate
from orchard.data.prompts import (
    Split,
    code_states,
    make_prompts,
    make_windows,
    read_split,
    rows_of_step,
)
from orchard.errors import DataError
from orchard.policy.item_tokenizer import compact_tokenizer, make_item_tokenizer
from orchard.testing import tiny_catalog

ITEMS = tiny_catalog(num_items=40)


def save(path: Path, history: list[list[int] | None], target: list[int], **more: object) -> Path:
    columns = {"history": pa.array(history, pa.list_(pa.int32())), "target": target, **more}
    pq.write_table(pa.table(columns), path)
    return path


def test_rows_keep_their_own_targets_and_the_recent_history(tmp_path: Path) -> None:
    one = save(tmp_path / "a.parquet", [[1, 2, 3], [1, 2, 3]], [4, 5], user_id=[7, 7])
    two = save(tmp_path / "b.parquet", [[9]], [8], user_id=[3])
    split = read_split([one, two], ITEMS, max_history=2)
    assert split.target.tolist() == [4, 5, 8]
    assert split.history.tolist() == [2, 3, 2, 3, 9]
    assert split.history_start.tolist() == [0, 2, 4, 5]
    assert split.user.tolist() == [7, 7, 3]


@pytest.mark.parametrize(
    ("history", "target", "said"),
    [
        ([], [], "no rows"),
        ([[1], []], [2, 3], "empty history"),
        ([[1], None], [2, 3], "empty history"),
        ([[1, 99]], [2], "item 99 is not in the catalog"),
        ([[1]], [-4], "item -4 is not in the catalog"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(
    tmp_path: Path, history: list[list[int] | None], target: list[int], said: str
) -> None:
    path = save(tmp_path / "bad.parquet", history, pa.array(target, pa.int64()))
    with pytest.raises(DataError, match=said):
        read_split([path], ITEMS, max_history=5)


def test_files_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_split([tmp_path / "none.parquet"], ITEMS, max_history=5)
    (tmp_path / "text.parquet").write_text("not parquet")
    with pytest.raises(DataError, match="not readable as Parquet"):
        read_split([tmp_path / "text.parquet"], ITEMS, max_history=5)
    pq.write_table(pa.table({"history": [[1]]}), tmp_path / "half.parquet")
    with pytest.raises(DataError, match="no `target`"):
        read_split([tmp_path / "half.parquet"], ITEMS, max_history=5)


def test_a_prompt_is_bos_and_the_codes_of_its_history() -> None:
    vocabulary = make_item_tokenizer(compact_tokenizer(ITEMS), ITEMS)
    form = vocabulary
    token, start = form.encode_history(np.array([3, 0, 5]), np.array([0, 2, 3]))
    for row, items in enumerate([[3, 0], [5]]):
        expected = [vocabulary.bos]
        for item in items:
            codes = ITEMS.codes[item]
            expected += [int(vocabulary.tokens_at(i)[c]) for i, c in enumerate(codes)]
        assert token[start[row] : start[row + 1]].tolist() == expected


def test_steps_walk_every_row_once_an_epoch_and_depend_on_nothing_else() -> None:
    batches = [rows_of_step(step, num_rows=10, per_step=4, seed=3) for step in range(5)]
    first, second = np.split(np.concatenate(batches), 2)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first.tolist() != second.tolist()
    again = rows_of_step(3, num_rows=10, per_step=4, seed=3)
    assert again.tolist() == batches[3].tolist()


@st.composite
def users(draw: st.DrawFn) -> list[list[int]]:
    one = st.lists(st.integers(0, 39), min_size=2, max_size=23)
    return draw(st.lists(one, min_size=1, max_size=4))


@pytest.mark.slow
@given(users(), st.integers(1, 8))
@settings(max_examples=60)
def test_windows_train_every_target_once_and_every_first_item(
    lives: list[list[int]], max_history: int
) -> None:
    rows = [
        (user, life[max(0, at - max_history) : at], life[at])
        for user, life in enumerate(lives)
        for at in range(1, len(life))
    ]
    split = Split(
        user=np.array([user for user, _, _ in rows]),
        history=np.array([item for _, history, _ in rows for item in history]),
        history_start=ragged.starts(np.array([len(history) for _, history, _ in rows])),
        target=np.array([target for _, _, target in rows]),
    )
    windows = make_windows(split, max_history=max_history)
    place = ragged.index_in_row(windows.start)
    fresh = place >= windows.fresh[ragged.row_of(windows.start)]
    assert np.diff(windows.start).max() <= max_history + 1
    assert Counter(windows.item[fresh].tolist()) == Counter(i for life in lives for i in life)
    # No fresh item but a user's first stands without context.
    assert int((fresh & (place == 0)).sum()) == len(lives)


def test_code_states_walk_the_trie() -> None:
    before, after = code_states(ITEMS, np.array([4, 11]))
    for row, item in enumerate([4, 11]):
        node = 0
        for level, code in enumerate(ITEMS.codes[item]):
            assert before[row, level] == node
            low, high = (int(ITEMS.trie.child_start[n]) for n in (node, node + 1))
            node = low + ITEMS.trie.code[low:high].tolist().index(code)
            assert after[row, level] == node


@pytest.mark.parametrize(
    ("users", "alike"),
    [
        (pa.array(["u1", "u2", "u1", "u1"]), [(0, 2), (0, 3), (2, 3)]),
        (pa.array(["u1", None, "u1", None]), [(0, 2)]),
        (pa.array([4, None, 4, None]), [(0, 2)]),
        (pa.array([4.0, float("nan"), 4.0, None]), [(0, 2)]),
        (pa.array(["a", "b", "a", "b"]).dictionary_encode(), [(0, 2), (1, 3)]),
        (pa.array(["5", "5", "5", "6"], pa.large_string()), [(0, 1), (0, 2), (1, 2)]),
        (pa.nulls(4), []),
    ],
)
def test_users_of_hand_made_splits_may_be_text_or_missing(
    tmp_path: Path, users: Any, alike: list[tuple[int, int]]
) -> None:
    table = {"user_id": users, "history": [[0]] * 4, "target": [1] * 4}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    pq.write_table(pa.table({**table, "user_id": users}), tmp_path / "b.parquet")
    catalog = from_codes([[0], [1]])
    user = read_split([tmp_path / "a.parquet"], catalog, max_history=3).user
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4) if user[i] == user[j]]
    assert pairs == alike
    both = read_split([tmp_path / "a.parquet", tmp_path / "b.parquet"], catalog, max_history=3).user
    known = {i for pair in alike for i in pair}
    assert all(both[i] == both[i + 4] for i in known)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("user_id", pa.array([[1], [2]]), "`user_id` of .* holds list.*; it must hold integers or"),
        ("user_id", pa.array([1.5, 2.0]), "holds fractions"),
        ("history", pa.array([[0, 1], [None, 1]]), "row 1 of .* has a missing item in `history`"),
        ("history", pa.array([[0.5], [1.0]]), "lists of integers"),
    ],
)
def test_columns_that_cannot_be_used_are_named(
    tmp_path: Path, column: str, values: Any, message: str
) -> None:
    table = {"user_id": [1, 2], "history": [[0], [1]], "target": [1, 0], column: values}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        read_split([tmp_path / "a.parquet"], from_codes([[0], [1]]), max_history=3)


def test_rows_may_carry_rewards_and_weights(tmp_path: Path) -> None:
    told = save(tmp_path / "a.parquet", [[0], [1]], [1, 0], reward=[0.5, -1], weight=[2, 0])
    plain = save(tmp_path / "b.parquet", [[0]], [1])
    catalog = from_codes([[0], [1]])
    split = read_split([told, plain], catalog, max_history=3)
    assert split.reward is not None
    assert split.weight is not None
    assert split.reward.tolist() == [0.5, -1.0, 1.0]
    assert split.weight.tolist() == [2.0, 0.0, 1.0]
    assert read_split([plain], catalog, max_history=3).reward is None
    tokenizer = make_item_tokenizer(compact_tokenizer(catalog), catalog)
    prompts = make_prompts(tokenizer, split, np.array([1, 0]))
    assert prompts.reward is not None
    assert prompts.reward.tolist() == [-1.0, 0.5]
    both = concatenate(read_split([plain], catalog, max_history=3), split)
    assert both.reward is not None
    assert both.reward.tolist() == [1.0, 0.5, -1.0, 1.0]
    for column, value in (("reward", None), ("weight", -1.0), ("reward", float("inf"))):
        save(tmp_path / "c.parquet", [[0]], [1], **{column: pa.array([value], pa.float64())})
        with pytest.raises(DataError, match=f"row 0 of c.parquet has {column}"):
            read_split([tmp_path / "c.parquet"], catalog, max_history=3)


def test_histories_of_a_fixed_size_are_read(tmp_path: Path) -> None:
    fixed = pa.array([[0, 1], [1, 1]], pa.list_(pa.int64(), 2))
    pq.write_table(pa.table({"history": fixed, "target": [1, 0]}), tmp_path / "a.parquet")
    split = read_split([tmp_path / "a.parquet"], from_codes([[0], [1]]), max_history=3)
    assert split.history.tolist() == [0, 1, 1, 1]
    assert split.history_start.tolist() == [0, 2, 4]


def test_the_digest_of_a_split_is_that_of_its_rows_whatever_part_of_them_is_read(
    tmp_path: Path,
) -> None:
    def digest_of(rows: dict[str, list[Any]], *, codes: int = 1, max_history: int = 2) -> str:
        items = from_codes([[code * codes] for code in range(4)], item_id=np.arange(4) + 10)
        pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
        return read_split([tmp_path / "rows.parquet"], items, max_history=max_history).digest

    rows: dict[str, list[Any]] = {
        "user_id": [1, 2], "history": [[10, 11, 12], [13]], "target": [13, 10]
    }  # fmt: skip
    found = digest_of(rows)
    assert len(found) == 64
    assert found == digest_of(rows, max_history=5) == digest_of(rows, codes=2)
    assert found != digest_of(rows | {"target": [13, 11]})
    assert found != digest_of(rows | {"history": [[11, 11, 12], [13]]})  # cut from the prompt
    assert found != digest_of(rows | {"history": [[10, 11], [12, 13]]})
    assert found != digest_of({name: column[::-1] for name, column in rows.items()})
