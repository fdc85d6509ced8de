"""Read data splits and encode their rows as prompts for the policy.

A row of a split is a history of items and the item that followed. The policy reads the codes of
the history, oldest item first, inside the prompt template of its item tokenizer (see
`orchard.policy.prompt_template`).

Shapes:  R rows   H history items   B prompts   Q sequences   T tokens   (R1 = R + 1, and so on)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from blake3 import blake3
from jaxtyping import Float64, Int, Int64

from orchard import ragged
from orchard.arrays import Starts
from orchard.catalog.catalog import Catalog
from orchard.context import NO_TOKEN, UNKNOWN, Context, ContextColumn
from orchard.data.columns import combined, numbers_of, users_of
from orchard.data.context import read_context
from orchard.errors import DataError
from orchard.parquet import read_table
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.types import Prompts


@dataclass(frozen=True, kw_only=True)
class Split:
    """Rows of one split, with items as catalog rows."""

    user: Int64[np.ndarray, " R"]
    history: Int64[np.ndarray, " H"]
    history_start: Annotated[Int64[np.ndarray, " R1"], Starts("H")]
    target: Int64[np.ndarray, " R"]
    digest: str = ""
    """BLAKE3 of the rows as they are in the files: users, whole histories and targets by item
    identifier. Rows of two splits belong together only where it is equal; empty if unknown."""
    row: Int64[np.ndarray, " R"] | None = None
    """Row of the files that each row is; None if they are all rows of the files, in order."""
    reward: Float64[np.ndarray, " R"] | None = None
    """Reward of the target; None if it is 1 in every row."""
    weight: Float64[np.ndarray, " R"] | None = None
    """Weight of each row where rewards are estimated from rows; None if all are 1."""
    logged: Float64[np.ndarray, " R"] | None = None
    """Log-probability with which the target was shown; None if it is not known."""
    context: Context | None = None
    """Context of the histories; None if prompts have none, or it is not known."""

    def __len__(self) -> int:
        return len(self.target)


def read_split(
    paths: Sequence[Path],
    catalog: Catalog,
    *,
    max_history: int,
    context: Sequence[ContextColumn] = (),
) -> Split:
    """Read the rows of one or more Parquet files as one split; see `read_splits`."""
    return read_splits([paths], catalog, max_history=max_history, context=context)[0]


def read_splits(
    groups: Sequence[Sequence[Path]],
    catalog: Catalog,
    *,
    max_history: int,
    context: Sequence[ContextColumn] = (),
) -> list[Split]:
    """Read splits that have users in common, each from one or more Parquet files.

    The columns are `history`, `target` and, optionally, `user_id`, `reward` and `weight`, which are
    1 by default. Histories keep their last `max_history` items. Users may be integers or text; a
    row without one counts as a distinct user. The columns of `context` are read as well, see
    `orchard.data.context`.

    Raises:
        DataError: a file or a column is missing or unreadable, there are no rows, a history is
            empty, an item is not in the catalog, a reward or weight is no finite number, or the
            context does not have a value for each item.
    """
    tables = [
        [
            read_table(
                path,
                role="split",
                columns=("history", "target"),
                remedy="data.path and the file names",
            )
            for path in paths
        ]
        for paths in groups
    ]
    names = [", ".join(path.name for path in paths) for paths in groups]
    user = users_of([table for group in tables for table in group], ", ".join(names))
    bounds = np.cumsum([sum(len(table) for table in group) for group in tables])
    return [
        _split(group, part, name, catalog, max_history=max_history, context=context)
        for group, part, name in zip(tables, np.split(user, bounds[:-1]), names, strict=True)
    ]


def _split(
    tables: Sequence[Any],
    user: Int64[np.ndarray, " R"],
    names: str,
    catalog: Catalog,
    *,
    max_history: int,
    context: Sequence[ContextColumn],
) -> Split:
    """Return the rows of some tables, whose users have numbers already."""
    if sum(len(table) for table in tables) == 0:
        raise DataError(f"split {names} has no rows; at least one is needed", code="data.no_rows")
    lists = [combined(table["history"]) for table in tables]
    counts = np.concatenate([part.value_lengths().fill_null(0).to_numpy() for part in lists])
    if (counts == 0).any():
        row = int(np.argmax(counts == 0))
        raise DataError(
            f"row {row} of {names} has an empty history ({int((counts == 0).sum())} such rows); "
            "drop rows that have no item before the target",
            code="data.empty_history",
        )
    start = ragged.starts(counts)
    flat = np.concatenate([part.flatten().to_numpy().astype(np.int64) for part in lists])
    recent, recent_start = ragged.last(flat, start, max_history)
    target = np.concatenate([combined(t["target"]).to_numpy() for t in tables]).astype(np.int64)
    try:
        history, targets = catalog.rows(recent), catalog.rows(target)
    except DataError as error:
        raise DataError(f"{names}: {error}", code=error.code) from error
    reward, weight = (numbers_of(tables, column, names) for column in ("reward", "weight"))
    told = [part for part in (reward, weight) if part is not None]
    return Split(
        user=user,
        history=history,
        history_start=recent_start,
        target=targets,
        digest=content_digest(user, flat, start, target, *told),
        reward=reward,
        weight=weight,
        context=read_context(tables, context, start, names, max_history=max_history),
    )


def hide_context(split: Split, share: float, *, seed: int) -> Split:
    """Return the split with the context of a share of its rows unknown, drawn from the seed."""
    if split.context is None or share == 0:
        return split
    draw = np.random.Generator(np.random.Philox(key=[seed, len(split)]))
    hidden = draw.random(len(split)) < share
    event, row = split.context.event.copy(), split.context.row.copy()
    event[hidden[ragged.row_of(split.history_start)]] = UNKNOWN
    row[hidden] = UNKNOWN
    return replace(split, context=Context(event=event, row=row))


def content_digest(*parts: np.ndarray | str) -> str:
    """Return the BLAKE3 digest of arrays and texts, each with its type and shape."""
    hasher = blake3()
    for part in parts:
        if isinstance(part, str):
            hasher.update(f"text {len(part.encode())}\n".encode() + part.encode())
        else:
            hasher.update(f"{part.dtype.str} {part.shape}\n".encode())
            hasher.update(np.ascontiguousarray(part).tobytes())
    return hasher.hexdigest()


def make_prompts(tokenizer: ItemTokenizer, split: Split, rows: Int64[np.ndarray, " B"]) -> Prompts:
    """Encode the selected rows of a split as prompts."""
    history, history_start = ragged.take(split.history, split.history_start, rows)
    context = split.context and split.context.take(split.history_start, rows)
    token, token_start = tokenizer.encode_history(history, history_start, context)
    return Prompts(
        id=rows.astype(np.int64),
        target=split.target[rows],
        history=history,
        history_start=history_start,
        token=token,
        token_start=token_start,
        reward=None if split.reward is None else split.reward[rows].astype(np.float32),
        logged=None if split.logged is None else split.logged[rows].astype(np.float32),
    )


def rows_of_step(
    step: int, *, num_rows: int, per_step: int, seed: int
) -> Int64[np.ndarray, " per_step"]:
    """Return the rows of 0-based step `step` in a concatenation of shuffled epochs.

    The result depends only on the arguments, so a resumed run needs no state besides its step.
    """
    first = step * per_step
    position = np.arange(first, first + per_step)
    epoch, row_in_epoch = position // num_rows, position % num_rows
    rows = np.empty(per_step, dtype=np.int64)
    for epoch_number in np.unique(epoch):
        order = np.random.Generator(np.random.Philox(key=[seed, int(epoch_number)])).permutation(
            num_rows
        )
        rows[epoch == epoch_number] = order[row_in_epoch[epoch == epoch_number]]
    return rows


@dataclass(frozen=True, kw_only=True)
class TrainingWindows:
    """Windows cut from user histories; every item of the split is fresh in at least one."""

    item: Int64[np.ndarray, " H"]
    start: Int64[np.ndarray, " Q1"]
    fresh: Int64[np.ndarray, " Q"]
    """Position in each window from which items are training targets; earlier ones are context."""
    context: Context | None = None
    """Context of the items, none after the last one of a window, and of the windows."""

    def __len__(self) -> int:
        return len(self.fresh)


def make_windows(split: Split, *, max_history: int, targets_only: bool = False) -> TrainingWindows:
    """Cut the split into few windows of `max_history + 1` items that train each target once.

    The items before a chain's first target are trained as well, except with `targets_only`.

    Rows of one user that continue one another form a chain. A chain keeps its last row and every
    `max_history // 2`-th row before it, so that an item keeps at least half a window of context.
    """
    order = np.argsort(split.user, kind="stable")  # files are often in order of time
    history, history_start = ragged.take(split.history, split.history_start, order)
    user, target = split.user[order], split.target[order]
    padded_history = ragged.pad(
        history[::-1],
        ragged.starts(np.diff(history_start)[::-1]),
        fill=-1,
        width=max_history,
    )[::-1, ::-1]  # right-aligned: the most recent item last
    shifted_history = np.concatenate([padded_history[:, 1:], target[:, None]], axis=1)
    # [R] whether the next row continues this one: same user, history longer by this row's target
    continued = np.zeros(len(split), dtype=bool)
    continued[:-1] = (shifted_history[:-1] == padded_history[1:]).all(1) & (user[:-1] == user[1:])
    heads = np.concatenate([[True], ~continued[:-1]])
    chain_start = np.flatnonzero(heads)
    chain_end = np.concatenate([chain_start[1:], [len(split)]]) - 1
    chain = np.cumsum(heads) - 1  # [R] chain of each row
    row_index = np.arange(len(split))
    stride = max(1, max_history // 2)
    kept = ((chain_end[chain] - row_index) % stride == 0) | heads
    window = np.flatnonzero(kept)  # [Q] row that each window ends in
    length = np.diff(history_start)[window] + 1
    rows_since_previous = np.diff(window, prepend=window[:1])
    since = np.where(heads[window], length if not targets_only else 1, rows_since_previous)
    fresh = length - since
    # Drop the window of a chain's first row if the chain's next window contains all of it.
    next_window = np.concatenate([window[1:], window[-1:]])
    contained = heads[window] & (chain[next_window] == chain[window]) & (next_window != window)
    contained &= length + (next_window - window) <= max_history + 1
    fresh[1:][contained[:-1]] -= 1 if targets_only else fresh[1:][contained[:-1]]
    window, length, fresh = window[~contained], length[~contained], fresh[~contained]
    start = ragged.starts(length)
    item = np.empty(int(start[-1]), dtype=np.int64)
    last = start[1:] - 1  # [Q] position of each window's target; the rest is its history
    is_history = np.ones(len(item), dtype=bool)
    is_history[last] = False
    item[is_history] = ragged.take(history, history_start, window)[0]
    item[last] = target[window]
    context = split.context and split.context.take(split.history_start, order[window])
    if context is not None:
        event = np.full((len(item), context.event.shape[1]), NO_TOKEN, dtype=np.int64)
        event[is_history] = context.event
        context = Context(event=event, row=context.row)
    return TrainingWindows(item=item, start=start, fresh=fresh, context=context)


def code_states(
    catalog: Catalog, item: Int[np.ndarray, " H"]
) -> tuple[Int64[np.ndarray, "H D"], Int64[np.ndarray, "H D"]]:
    """Return the trie node before and after each code of each item, -1 past its end."""
    leaf = torch.from_numpy(catalog.leaf_of_item[item])
    node_after = catalog.trie.path(catalog.trie.node_of(leaf))
    node_before = torch.cat([torch.zeros_like(node_after[:, :1]), node_after[:, :-1]], dim=1)
    node_before = torch.where(node_after >= 0, node_before, -1)
    return node_before.numpy(), node_after.numpy()
