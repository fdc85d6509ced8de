"""Divide training rows into those of the warm start and fresh ones, which come after it.

Reinforcement learning on rows that the policy knows by heart teaches it little: their groups hit
more often than those of rows to come, and the gradient sharpens what is known. Fresh rows are files
of later rows (`data.fresh`) or the latest rows of the training files (`data.hold_back`).

Shapes:  R rows
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int64

from orchard import arrays, ragged
from orchard.catalog.catalog import Catalog
from orchard.context import ContextColumn
from orchard.data.prompts import Split, content_digest, hide_context, read_splits
from orchard.errors import DataError
from orchard.settings import DataConfig


def read_training_rows(
    data: DataConfig,
    catalog: Catalog,
    context: Sequence[ContextColumn] = (),
    *,
    seed: int = 0,
) -> tuple[Split, Split | None]:
    """Read the rows of the warm start, and the fresh rows if the settings name any.

    The columns of `context` are read with them, and hidden in a share of the rows
    (`data.hide_context`), which is drawn from the seed.

    Raises:
        DataError: as `read_splits` and `hold_back`.
    """
    groups = [[data.path / name for name in files] for files in (data.train, data.fresh) if files]
    splits = read_splits(groups, catalog, max_history=data.max_history, context=context)
    splits = [hide_context(split, data.hide_context, seed=seed) for split in splits]
    if data.hold_back:
        return hold_back(splits[0], data.hold_back, by=data.hold_back_by)
    return splits[0], splits[1] if data.fresh else None


def hold_back(split: Split, share: float, *, by: Literal["row", "user"]) -> tuple[Split, Split]:
    """Divide a split into the rows that are kept and the latest rows, which are held back.

    Args:
        split: rows in order of time, at least those of each user.
        share: share of the rows to hold back, above 0 and below 1.
        by: "row" holds back the last rows of the split, "user" the last rows of each user.

    Raises:
        DataError: no row would be held back, or none kept.
    """
    held = last_rows(split, share) if by == "row" else last_rows_of_users(split, share)
    count = int(held.sum())
    if count in (0, len(split)):
        remedy = "lower it" if count else "raise it, or add rows"
        if by == "user" and not count:
            remedy += '; or set data.hold_back_by = "row", as no user has rows enough to share'
        raise DataError(
            f"data.hold_back = {share:g} holds back {count} of {len(split)} training rows, and at "
            f"least one is needed on either side; {remedy}",
            code="data.empty_hold_back",
        )
    return take(split, np.flatnonzero(~held)), take(split, np.flatnonzero(held))


def last_rows(split: Split, share: float) -> Bool[np.ndarray, " R"]:
    """Select the last rows of a split: a share of all, rounded."""
    return np.arange(len(split)) >= len(split) - round(share * len(split))


def last_rows_of_users(split: Split, share: float) -> Bool[np.ndarray, " R"]:
    """Select the last rows of each user: a share of the user's rows, rounded, but never all."""
    order = np.argsort(split.user, kind="stable")
    user = split.user[order]
    opens = np.flatnonzero(np.concatenate([[True], user[1:] != user[:-1]]))
    count = np.diff(opens, append=len(user))  # rows of each user
    kept = np.maximum(1, np.floor(count * (1 - share) + 0.5).astype(np.int64))
    held = np.zeros(len(split), np.bool_)
    held[order] = ragged.index_in_row(ragged.starts(count)) >= np.repeat(kept, count)
    return held


def take(split: Split, rows: Int64[np.ndarray, " R"]) -> Split:
    """Select rows of a split, which remember their place in its files."""
    return replace(
        arrays.select(split, rows, axis="R"),
        digest=content_digest(split.digest, rows) if split.digest else "",
        row=rows if split.row is None else split.row[rows],
    )


def concatenate(train: Split, fresh: Split | None) -> Split:
    """Return the rows of both splits, or the first alone if there is no other."""
    if fresh is None:
        return train
    parts = [replace(split, digest="", row=None) for split in (train, fresh)]
    for name in ("reward", "weight"):
        if any(getattr(split, name) is not None for split in parts):
            parts = [
                split
                if getattr(split, name) is not None
                else replace(split, **{name: np.ones(len(split))})
                for split in parts
            ]
    return replace(arrays.concatenate(parts), digest=content_digest(train.digest, fresh.digest))


def files_of(data: DataConfig, *, fresh: bool) -> list[Path]:
    """Return the files that the rows of the warm start, or the fresh rows, were read from."""
    return [data.path / name for name in (data.fresh if fresh and data.fresh else data.train)]
