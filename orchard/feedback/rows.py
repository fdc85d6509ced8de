"""Feedback as rows to learn from: requests, what they were shown and what it earned.

Shapes:  G requests   G1 = G + 1   R shown items   D codes of the longest item
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import polars as pl
from jaxtyping import Float64, Int64

from orchard import ragged
from orchard.arrays import Starts
from orchard.catalog.catalog import Catalog
from orchard.data.prompts import Split, content_digest
from orchard.errors import DataError
from orchard.evaluation.lists import inclusion
from orchard.feedback.read import read_feedback
from orchard.feedback.utilities import Examples

Lists = Literal["single", "independent"]
"""Answers that have importance weights, see `learner.lists`."""
_NAMED = 1 << 50
"""Distance from 0 of the numbers of users who have none, beyond those of the training files."""
_CELLS = 1 << 10
"""Bound of lists times squared length whose inclusion is computed at a time."""


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """Requests in order of time, and the items that each was shown, in order of rank."""

    requests: Split
    """One row for each request; its target is the shown item with the highest reward, the first of
    several, and its `reward` and `weight` are those of the target."""
    time: Float64[np.ndarray, " G"]
    """Time of each request in seconds."""
    row_start: Annotated[Int64[np.ndarray, " G1"], Starts("R")]
    """Shown items of request g: `row_start[g] : row_start[g + 1]`."""
    item: Int64[np.ndarray, " R"]
    """Catalog row of each shown item."""
    leaf: Int64[np.ndarray, " R"]
    """Its leaf."""
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
    lists: Lists = "single"
    """Answers that `draws` has: of one draw, or lists drawn without replacement as well."""

    @cached_property
    def draws(self) -> Split:
        """Shown items that were drawn from the policy with a known probability, a row for each.

        One draw may show several items, which share a semantic ID: they are one row, with the sum
        of their rewards. An item of a list is drawn with its probability to be in the list, if
        all that was drawn is shown.

        Raises:
            DataError: there are none.
        """
        of_row = ragged.row_of(self.row_start)
        usable = self.width > 0 if self.lists == "independent" else self.width == 1
        usable &= np.isfinite(self.logprob).all(1) & (self.weight > 0)
        rows = np.flatnonzero(usable)
        # Draws of a request by their leaf, the first item of each, and the sum of their rewards.
        key, first, inverse = np.unique(
            of_row[rows] * (1 + int(self.leaf.max(initial=0))) + self.leaf[rows],
            return_index=True, return_inverse=True,
        )  # fmt: skip
        reward = np.bincount(inverse, self.reward[rows], minlength=len(key))
        rows = rows[first]
        number = np.bincount(of_row[rows], minlength=len(self.requests))
        whole = number[of_row[rows]] == self.width[rows]
        rows, reward = rows[whole], reward[whole]
        if len(rows) == 0:
            raise DataError(
                f"none of {len(self)} shown items was drawn with a known probability, so that they "
                'have no importance weights; let the endpoint explore with decoder = "beam_sample" '
                "and temperature = 1, and k = width = 1"
                + ("" if self.lists == "independent" else ' (or set learner.lists = "independent")')
                + ", or learn by utilities, which need none: rewards.weights = {utility = 1.0} and "
                "another rollout.search",
                code="data.no_logprobs",
            )
        requests, request = self.requests, of_row[rows]
        history, start = ragged.take(requests.history, requests.history_start, request)
        return Split(
            user=requests.user[request],
            history=history,
            history_start=start,
            target=self.item[rows],
            digest=content_digest(requests.digest, rows, reward, self.lists),
            reward=reward,
            weight=self.weight[rows],
            logged=_shown_logprobs(self.logprob[rows].sum(1), request, self.width[rows]),
        )

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
            leaf=self.leaf,
            reward=self.reward,
            weight=self.weight,
        )


def open_feedback(
    folders: Sequence[Path], catalog: Catalog, max_history: int, lists: Lists = "single"
) -> Feedback:
    """Read feedback folders as rows of a catalog.

    Items are found by their identifiers; shown items that the catalog lacks are left out and
    counted, and so are requests without an item of the catalog in their history.

    Args:
        folders: folders that `orchard data feedback` has written.
        catalog: catalog of the run.
        max_history: number of most recent history items that are kept.
        lists: answers that draws are taken from, see `Feedback.draws`.

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
        time=time[chosen],
        row_start=row_start,
        item=item[order].astype(np.int64),
        leaf=catalog.leaf_of_item[item[order]].astype(np.int64),
        reward=reward,
        weight=weight,
        logprob=_logprobs(selected, catalog, item[order]),
        width=_widths(selected),
        facts=facts,
        lists=lists,
    )


def _shown_logprobs(
    logprob: Float64[np.ndarray, " R"],
    request: Int64[np.ndarray, " R"],
    width: Int64[np.ndarray, " R"],
) -> Float64[np.ndarray, " R"]:
    """Return the log-probability of each draw to be among the `width` draws of its request."""
    shown = np.minimum(logprob, 0.0)
    several = np.flatnonzero(width > 1)
    if len(several) == 0:
        return shown
    _, row, count = np.unique(request[several], return_inverse=True, return_counts=True)
    place = ragged.index_in_row(ragged.starts(count))  # the draws of a request are neighbors
    table = np.full((len(count), int(count.max())), -np.inf)
    table[row, place] = shown[several]
    step = max(1, _CELLS // table.shape[1] ** 2)
    for first in range(0, len(table), step):
        part = slice(first, first + step)
        table[part] = np.log(np.maximum(inclusion(table[part], count[part]), 1e-300))
    shown[several] = table[row, place]
    return shown


def _users(user: pl.Series) -> Int64[np.ndarray, " R"]:
    """Return the number of each user, negative where the name is none or there is no user.

    Users with a number are those of the training files. A row without a user counts as a user of
    its own.
    """
    number = user.cast(pl.Int64, strict=False)
    named = -_NAMED - user.rank("dense").cast(pl.Int64).fill_null(0).to_numpy()
    alone = -2 * _NAMED - np.arange(len(user))
    found = np.where(number.is_null().to_numpy(), named, number.fill_null(0).to_numpy())
    return np.where(user.is_null().to_numpy(), alone, found)


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
