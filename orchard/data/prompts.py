"""Data splits, and what the policy reads of them.

A row of a split is a history of items and the item that followed. A policy reads the codes of the
history, oldest item first, within the frame of its vocabulary (see
`orchard.policy.prompt_template`).

Shapes:  R rows   H history items   B prompts   Q sequences   T tokens   (R1 = R + 1, and so on)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int, Int64

from orchard import ragged
from orchard.catalog.catalog import Catalog
from orchard.errors import DataError
from orchard.parquet import read_table
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.types import Prompts


@dataclass(frozen=True, kw_only=True)
class Split:
    """Rows of one split; items are catalog rows."""

    user: Int64[np.ndarray, " R"]
    history: Int64[np.ndarray, " H"]
    history_start: Int64[np.ndarray, " R1"]
    target: Int64[np.ndarray, " R"]

    def __len__(self) -> int:
        return len(self.target)


def read_split(paths: Sequence[Path], catalog: Catalog, *, max_history: int) -> Split:
    """The rows of one or more Parquet files: columns `history`, `target`, and `user_id` if known.

    Histories keep their last `max_history` items. Rows without a `user_id` are users of their own.

    Raises:
        DataError: a missing or unreadable file, a missing column, no rows, an empty history, or an
            item that the catalog does not know.
    """
    tables = [
        read_table(
            path,
            role="split",
            columns=("history", "target"),
            remedy="data.path and the file names",
        )
        for path in paths
    ]
    names = ", ".join(path.name for path in paths)
    if sum(len(table) for table in tables) == 0:
        raise DataError(f"split {names} has no rows; at least one is needed")
    lists = [_combined(table["history"]) for table in tables]
    counts = np.concatenate([part.value_lengths().fill_null(0).to_numpy() for part in lists])
    if (counts == 0).any():
        row = int(np.argmax(counts == 0))
        raise DataError(
            f"row {row} of {names} has an empty history ({int((counts == 0).sum())} such rows); "
            "drop rows that have no item before the target"
        )
    start = ragged.starts(counts)
    flat = np.concatenate([part.flatten().to_numpy().astype(np.int64) for part in lists])
    recent, recent_start = ragged.last(flat, start, max_history)
    target = np.concatenate([_combined(t["target"]).to_numpy() for t in tables]).astype(np.int64)
    users: list[np.ndarray] = []
    for index, table in enumerate(tables):
        known = "user_id" in table.column_names
        one = table["user_id"].to_numpy() if known else -1 - np.arange(len(table)) - (index << 40)
        users.append(one.astype(np.int64))
    return Split(
        user=np.concatenate(users),
        history=catalog.rows(recent),
        history_start=recent_start,
        target=catalog.rows(target),
    )


def _combined(column: Any) -> Any:
    combined = column.combine_chunks()
    if isinstance(combined, pa.ChunkedArray):  # an empty table has no chunk to give back
        return pa.array([], column.type)
    return combined


def make_prompts(tokenizer: ItemTokenizer, split: Split, rows: Int64[np.ndarray, " B"]) -> Prompts:
    """The given rows of a split as the policy reads them."""
    history, history_start = ragged.take(split.history, split.history_start, rows)
    token, token_start = tokenizer.encode_history(history, history_start)
    return Prompts(
        id=rows.astype(np.int64),
        target=split.target[rows],
        history=history,
        history_start=history_start,
        token=token,
        token_start=token_start,
    )


def rows_of_step(
    step: int, *, num_rows: int, per_step: int, seed: int
) -> Int64[np.ndarray, " per_step"]:
    """The rows of 0-based step `step`: epochs of shuffled rows laid end to end.

    A pure function of its arguments, so that a resumed run needs no cursor but its step.
    """
    first = step * per_step
    place = np.arange(first, first + per_step)
    epoch, inside = place // num_rows, place % num_rows
    rows = np.empty(per_step, dtype=np.int64)
    for one in np.unique(epoch):
        order = np.random.Generator(np.random.Philox(key=[seed, int(one)])).permutation(num_rows)
        rows[epoch == one] = order[inside[epoch == one]]
    return rows


@dataclass(frozen=True, kw_only=True)
class TrainingWindows:
    """User histories cut into windows; every item of the split is fresh in at least one."""

    item: Int64[np.ndarray, " H"]
    start: Int64[np.ndarray, " Q1"]
    fresh: Int64[np.ndarray, " Q"]
    """Place in the window from which items are trained on; earlier ones are context."""

    def __len__(self) -> int:
        return len(self.fresh)


def make_windows(split: Split, *, max_history: int) -> TrainingWindows:
    """The fewest windows of `max_history + 1` items that train every target of the split once.

    Rows of one user that continue one another form a chain. Of a chain, the last row is kept, and
    every so manieth row before it, half a window apart, so that an item keeps at least half a
    window of context.
    """
    order = np.argsort(split.user, kind="stable")  # files are often in order of time
    history, history_start = ragged.take(split.history, split.history_start, order)
    user, target = split.user[order], split.target[order]
    table = ragged.pad(
        history[::-1],
        ragged.starts(np.diff(history_start)[::-1]),
        fill=-1,
        width=max_history,
    )[::-1, ::-1]  # right-aligned: the most recent item last
    extended = np.concatenate([table[:, 1:], target[:, None]], axis=1)
    linked = np.zeros(len(split), dtype=bool)  # the next row continues this one
    linked[:-1] = (extended[:-1] == table[1:]).all(1) & (user[:-1] == user[1:])
    heads = np.concatenate([[True], ~linked[:-1]])
    chain_start = np.flatnonzero(heads)
    chain_end = np.concatenate([chain_start[1:], [len(split)]]) - 1
    chain = np.cumsum(heads) - 1
    row = np.arange(len(split))
    stride = max(1, max_history // 2)
    kept = ((chain_end[chain] - row) % stride == 0) | heads
    window = np.flatnonzero(kept)
    length = np.diff(history_start)[window] + 1
    since = np.diff(window, prepend=window[:1])
    fresh = np.where(heads[window], 0, length - since)
    # A head whose whole window lies inside the next one adds nothing.
    after = np.concatenate([window[1:], window[-1:]])
    inside = heads[window] & (chain[after] == chain[window]) & (after != window)
    inside &= length + (after - window) <= max_history + 1
    fresh[1:][inside[:-1]] = 0
    window, length, fresh = window[~inside], length[~inside], fresh[~inside]
    start = ragged.starts(length)
    item = np.empty(int(start[-1]), dtype=np.int64)
    last = start[1:] - 1
    body = np.ones(len(item), dtype=bool)
    body[last] = False
    item[body] = ragged.take(history, history_start, window)[0]
    item[last] = target[window]
    return TrainingWindows(item=item, start=start, fresh=fresh)


def code_states(
    catalog: Catalog, item: Int[np.ndarray, " H"]
) -> tuple[Int64[np.ndarray, "H D"], Int64[np.ndarray, "H D"]]:
    """Trie node before and after each code of each item, -1 past its end."""
    leaf = torch.from_numpy(catalog.leaf_of_item[item])
    after = catalog.trie.path(catalog.trie.node_of(leaf))
    before = torch.cat([torch.zeros_like(after[:, :1]), after[:, :-1]], dim=1)
    before = torch.where(after >= 0, before, -1)
    return before.numpy(), after.numpy()
