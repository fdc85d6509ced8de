"""Feedback as rows to learn from: requests, what they were shown and what it earned.

Shapes:  G requests   G1 = G + 1   R shown items   D codes of the longest item
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import polars as pl
from jaxtyping import Float64, Int64

from orchard import ragged
from orchard.arrays import Starts
from orchard.catalog.catalog import Catalog
from orchard.data.prompts import Split, content_digest
from orchard.errors import DataError
from orchard.feedback.read import read_feedback
from orchard.feedback.utilities import Examples


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """Requests in order of time, and the items that each was shown, in order of rank."""

    requests: Split
    """One row for each request; its target is the shown item with the highest reward, the first of
    several, and its `reward` and `weight` are those of the target."""
    row_start: Annotated[Int64[np.ndarray, " G1"], Starts("R")]
    """Shown items of request g: `row_start[g] : row_start[g + 1]`."""
    item: Int64[np.ndarray, " R"]
    """Catalog row of each shown item."""
    reward: Float64[np.ndarray, " R"]
    weight: Float64[np.ndarray, " R"]
    logprob: Float64[np.ndarray, "R D"]
    """Log-probability of each code under the policy that was logged, 0 past the end of an item and
    NaN throughout where there is none for the item's codes in this catalog."""
    width: Int64[np.ndarray, " R"]
    """Number of items that the decoder drew at once, 0 where it did not draw from the policy: it
    was no `beam_sample` at temperature 1, or items were excluded."""
    facts: dict[str, int] = field(default_factory=dict[str, int])
    """Counts of what was left out."""

    def __len__(self) -> int:
        return len(self.item)

    def examples(self, catalog: Catalog) -> Examples:
        """Return the requests with items as leaves, for utilities."""
        requests, leaf_of_item = self.requests, catalog.leaf_of_item.astype(np.int64)
        return Examples(
            history=leaf_of_item[requests.history],
            start=requests.history_start,
            target=leaf_of_item[requests.target],
            row_start=self.row_start,
            leaf=leaf_of_item[self.item],
            reward=self.reward,
            weight=self.weight,
        )


def open_feedback(folders: Sequence[Path], catalog: Catalog, *, max_history: int) -> Feedback:
    """Read feedback folders as rows of a catalog.

    Items are found by their identifiers; shown items that the catalog lacks are left out and
    counted, and so are requests without an item of the catalog in their history.

    Args:
        folders: folders that `orchard data feedback` has written.
        catalog: catalog of the run.
        max_history: number of most recent history items that are kept.

    Raises:
        DataError: as `read_feedback`, or nothing is left.
    """
    table = read_feedback(folders)
    item, listed = catalog.lookup(table["item_id"].to_numpy())
    flat = table.select(pl.col("history").explode(empty_as_null=False, keep_nulls=False))
    row, in_catalog = catalog.lookup(flat["history"].to_numpy())
    length = table["history"].list.len().fill_null(0).to_numpy().astype(np.int64)
    owner = np.repeat(np.arange(len(table)), length)[in_catalog]
    start = ragged.starts(np.bincount(owner, minlength=len(table)))
    history, start = ragged.last(row[in_catalog].astype(np.int64), start, max_history)
    has_history = np.diff(start) > 0
    kept = np.flatnonzero(listed & has_history)
    facts = {
        "unmapped": int((~listed).sum()),
        "without_history": int((listed & ~has_history).sum()),
    }
    if len(kept) == 0:
        raise DataError(
            f"of {len(table)} shown items {facts['unmapped']} are not in the catalog of "
            f"{len(catalog)} items, and {facts['without_history']} have no history in it; nothing "
            "can be learned, check that data.feedback and data.items belong together",
            code="data.no_exposures",
        )
    # Requests in order of time; one that was answered twice is two.
    request = table.select(pl.struct("request_id", "time").rank("dense")).to_series().to_numpy()
    time, rank = table["time"].to_numpy(), table["rank"].fill_null(0).to_numpy()
    order = kept[np.lexsort((rank[kept], request[kept], time[kept]))]
    opens = np.concatenate([[True], np.diff(request[order].astype(np.int64)) != 0])
    row_start = np.append(np.flatnonzero(opens), len(order))
    reward, weight = table["reward"].to_numpy()[order], table["weight"].to_numpy()[order]
    # The best item of each request: highest reward, then first rank.
    of_row = ragged.row_of(row_start)
    best = np.lexsort((np.arange(len(order)), -reward, of_row))[row_start[:-1]]
    chosen = order[best]
    of_request, request_start = ragged.take(history, start, chosen)
    user = _users(table["user"])[chosen]
    requests = Split(
        user=user,
        history=of_request,
        history_start=request_start,
        target=item[chosen].astype(np.int64),
        reward=reward[best],
        weight=weight[best],
        digest=content_digest(
            user, of_request, request_start, item[order], row_start, reward, weight
        ),
    )
    selected = table[order]
    return Feedback(
        requests=requests,
        row_start=row_start,
        item=item[order].astype(np.int64),
        reward=reward,
        weight=weight,
        logprob=_logprobs(selected, catalog, item[order]),
        width=_widths(selected),
        facts=facts,
    )


def _users(user: pl.Series) -> Int64[np.ndarray, " R"]:
    """Number users; a row without one counts as a user of its own, with a negative number."""
    number = user.rank("dense").cast(pl.Int64)
    known = number.fill_null(0).to_numpy()
    return np.where(user.is_null().to_numpy(), -1 - np.arange(len(user)), known)


def _logprobs(
    table: pl.DataFrame, catalog: Catalog, item: Int64[np.ndarray, " R"]
) -> Float64[np.ndarray, "R D"]:
    """Return the log-probabilities of items whose codes are those that were logged."""
    depth = catalog.codes.shape[1]
    codes = table["sid"].list.len().fill_null(0).to_numpy().astype(np.int64)
    logged = ragged.pad(
        table["sid"].explode(empty_as_null=False, keep_nulls=False).to_numpy().astype(np.int64),
        ragged.starts(codes), fill=-1, width=depth,
    )  # fmt: skip
    plain = catalog.plain_codes[item]
    same = (logged[:, :depth] == plain).all(1) & (logged[:, depth:] < 0).all(1)
    number = table["logprob"].list.len().fill_null(0).to_numpy().astype(np.int64)
    values = table["logprob"].explode(empty_as_null=False, keep_nulls=False)
    flat = values.cast(pl.Float64).fill_null(np.nan).to_numpy()
    padded = np.full((len(table), max(depth, int(number.max(initial=0)))), 0.0)
    padded[ragged.row_of(ragged.starts(number)), ragged.index_in_row(ragged.starts(number))] = flat
    whole = number == (catalog.codes[item] >= 0).sum(1)
    return np.where((same & whole)[:, None], padded[:, :depth], np.nan)


def _widths(table: pl.DataFrame) -> Int64[np.ndarray, " R"]:
    """Return the number of items drawn at once, 0 where the probability of a draw is not known."""
    drawn = (
        (pl.col("decoder") == "beam_sample") & (pl.col("temperature") == 1.0)
        & (pl.col("source") == "policy") & ~pl.col("restricted")
    )  # fmt: skip
    width = pl.when(drawn.fill_null(False)).then(pl.col("width").fill_null(0)).otherwise(0)
    return table.select(width.cast(pl.Int64).alias("width"))["width"].to_numpy()
