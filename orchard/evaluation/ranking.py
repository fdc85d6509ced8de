"""How good a ranked list is: hit rate, NDCG, coverage, diversity, and how sure one may be of them.

All metrics of a row follow from two numbers, the rank of its target among the semantic IDs and
among the items, so ranks are what an evaluation keeps and what two evaluations are paired by.

Shapes:  B rows   B1 = B + 1   C candidates of all rows   L steps of a candidate   M metrics
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float64, Int, Int64

from orchard import ragged
from orchard.errors import DataError
from orchard.evaluation.bootstrap import Estimate, estimates
from orchard.folders import atomic_write

HIT_RATE_AT = (1, 3, 5, 10, 20, 50)
NDCG_AT = (3, 5, 10)


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetRanks:
    """Where each row's target came, 0 for the top of the list."""

    MISS: ClassVar[int] = 2**31 - 1
    """Rank of a target that is not in the list."""

    sid: Int64[np.ndarray, " B"]
    """Among the distinct semantic IDs of the list."""
    item: Int64[np.ndarray, " B"]
    """Among the items, when each semantic ID is replaced by all items that carry it."""

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.sid)


def target_ranks(
    *,
    leaf: Int[np.ndarray, " C"],
    start: Int[np.ndarray, " B1"],
    leaf_items: Int[np.ndarray, " C"],
    target_leaf: Int[np.ndarray, " B"],
    target_position: Int[np.ndarray, " B"],
) -> TargetRanks:
    """The rank of each row's target in its list.

    A list shows a leaf once, so a repeated candidate (i.i.d. sampling) takes no second place.

    Args:
        leaf: catalog leaf of each candidate, best first within its row.
        start: row b holds the candidates `start[b] : start[b + 1]`.
        leaf_items: number of catalog items on each candidate's leaf.
        target_leaf: leaf of the target.
        target_position: place of the target among the items of its own leaf.
    """
    row = ragged.owners(start)
    fresh = _fresh(leaf, row)
    leaves_before = ragged.starts(fresh.astype(np.int64))
    items_before = ragged.starts(np.where(fresh, leaf_items, 0))
    hit = np.flatnonzero(fresh & (leaf == target_leaf[row]))
    found = row[hit]
    sid = np.full(len(target_leaf), TargetRanks.MISS, dtype=np.int64)
    item = sid.copy()
    sid[found] = leaves_before[hit] - leaves_before[start[found]]
    item[found] = items_before[hit] - items_before[start[found]] + target_position[found]
    return TargetRanks(sid=sid, item=item)


def metrics(
    ranks: TargetRanks, *, width: int, resamples: int = 2000, seed: int = 0
) -> dict[str, Estimate]:
    """HR@k and NDCG@k as `hr@10/sid`, `ndcg@10/item`, ...

    A metric whose k exceeds `width`, the number of candidates searched for, is left out: a list
    that stops earlier would understate it.

    Raises:
        DataError: there are no rows, or `width` or `resamples` is not positive.
    """
    names, values = _row_values(ranks, width)
    return estimates(names, values, resamples=resamples, seed=seed)


def paired(
    a: TargetRanks, b: TargetRanks, *, width: int, resamples: int = 2000, seed: int = 0
) -> dict[str, Estimate]:
    """mean(a) - mean(b) of every metric, both sides resampled on the same rows.

    Raises:
        DataError: as `paired_over_seeds`.
    """
    return paired_over_seeds([a], [b], width=width, resamples=resamples, seed=seed)


def paired_over_seeds(
    a: Sequence[TargetRanks],
    b: Sequence[TargetRanks],
    *,
    width: int,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """`paired` of two recipes that were each run with several seeds.

    A row's metric is averaged over the seeds of its side before rows are resampled: the interval
    speaks of other rows, not of other seeds.

    Raises:
        DataError: a side is empty, or row counts differ, there are no rows, or a setting is not
            positive.
    """
    sizes = sorted({len(ranks) for ranks in (*a, *b)})
    if not a or not b or len(sizes) != 1:
        raise DataError(
            f"cannot pair {len(a)} with {len(b)} evaluations of {sizes} rows; "
            "evaluate both sides on the same rows of one split"
        )
    names, _ = _row_values(a[0], width)
    left, right = (
        np.mean([_row_values(ranks, width)[1] for ranks in side], axis=0) for side in (a, b)
    )
    return estimates(names, left - right, resamples=resamples, seed=seed)


def coverage(
    *, leaf: Int[np.ndarray, " C"], num_leaves: int, start: Int[np.ndarray, " B1"], k: int
) -> float:
    """Share of the catalog's leaves that the first k places of any list show."""
    row = ragged.owners(start)
    fresh = _fresh(leaf, row)
    before = ragged.starts(fresh.astype(np.int64))
    shown = fresh & (before[:-1] - before[start[row]] < k)
    return len(np.unique(leaf[shown])) / num_leaves


def diversity(*, path: Int[np.ndarray, "C L"], start: Int[np.ndarray, " B1"]) -> float:
    """Mean of 1 - LCP / L over all pairs of candidates of a row, then over rows.

    LCP is the length of the longest common prefix of two paths (codes, or trie nodes; padded with
    any one value). 1: all first steps differ; 0: all candidates are the same. Rows of fewer than
    two candidates have no pairs and do not count; 0 if no row has two.
    """
    size, row = np.diff(start), ragged.owners(start)
    num_pairs = size * (size - 1) / 2
    sorted_path = path[np.lexsort((*path.T[::-1], row))]
    parts = np.ones(len(path), dtype=bool)  # where a group of equal prefixes begins
    parts[1:] = row[1:] != row[:-1]
    shared = np.zeros(len(size))
    # A pair shares l steps iff both are in one group of prefixes of length l, so the members of the
    # groups of every length add up to the LCP of all pairs without looking at a pair.
    for step in sorted_path.T:
        parts[1:] |= step[1:] != step[:-1]
        first = np.flatnonzero(parts)
        members = np.diff(first, append=len(path))
        shared += np.bincount(row[first], members * (members - 1) / 2, minlength=len(size))
    counted = num_pairs > 0
    if not counted.any():
        return 0.0
    return float(np.mean(1 - shared[counted] / num_pairs[counted] / path.shape[1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One policy on one set of rows."""

    metrics: Mapping[str, Estimate]
    ranks: TargetRanks
    row: Int64[np.ndarray, " B"]
    """Row number in the split; what two evaluations are paired by."""
    width: int
    """Candidates searched for per row."""
    seconds: float
    policy: str
    """Version of the policy."""
    catalog: str
    """Digest of the catalog."""
    extra: Mapping[str, float] = field(default_factory=dict[str, float])
    """Coverage, diversity, forward tokens, and whatever else is one number."""

    @property
    def num_rows(self) -> int:
        """Number of rows evaluated."""
        return len(self.ranks)


def difference(a: Evaluation, b: Evaluation) -> dict[str, Estimate]:
    """`paired` of two evaluations, for the metrics that both searched wide enough for.

    Raises:
        DataError: they are not of the same rows.
    """
    if not np.array_equal(a.row, b.row):
        raise DataError(
            f"evaluations of {a.num_rows} and {b.num_rows} rows are not of the same rows; "
            "evaluate both on the same rows of one split"
        )
    return paired(a.ranks, b.ranks, width=min(a.width, b.width), resamples=2000, seed=0)


def write(evaluation: Evaluation, path: Path) -> None:
    """Save as JSON at `path`, and the ranks beside it as Parquet: row, rank_sid, rank_item.

    The JSON file comes last and each file whole, so that a JSON file always has its ranks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {
            "row": evaluation.row,
            "rank_sid": evaluation.ranks.sid.astype(np.int32),
            "rank_item": evaluation.ranks.item.astype(np.int32),
        }
    )
    facts = {
        "metrics": {name: asdict(value) for name, value in evaluation.metrics.items()},
        "policy": evaluation.policy,
        "catalogue": evaluation.catalog,
        "num_rows": evaluation.num_rows,
        "width": evaluation.width,
        "seconds": evaluation.seconds,
        # JSON knows no NaN or infinity.
        "extra": {n: v if math.isfinite(v) else None for n, v in evaluation.extra.items()},
    }
    partial = path.with_name(f".{path.name}.partial")
    pq.write_table(table, partial, compression="zstd")
    partial.replace(path.with_suffix(".parquet"))
    atomic_write(path, json.dumps(facts, indent=2, allow_nan=False) + "\n")


def read(path: Path) -> Evaluation:
    """What `write` saved.

    Raises:
        DataError: either file is missing or is not what `write` writes.
    """
    try:
        facts: dict[str, Any] = json.loads(path.read_text())
        table = pq.read_table(path.with_suffix(".parquet"))
        row, sid, item = (
            table[name].to_numpy().astype(np.int64) for name in ("row", "rank_sid", "rank_item")
        )
        return Evaluation(
            metrics={name: Estimate(**value) for name, value in facts["metrics"].items()},
            ranks=TargetRanks(sid=sid, item=item),
            row=row,
            width=facts["width"],
            seconds=facts["seconds"],
            policy=facts["policy"],
            catalog=facts["catalogue"],
            extra={n: math.nan if v is None else v for n, v in facts["extra"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"evaluation {path} and its Parquet file cannot be read "
            f"({type(error).__name__}: {error}); evaluate again"
        ) from error


def _fresh(leaf: Int[np.ndarray, " C"], row: Int[np.ndarray, " C"]) -> Bool[np.ndarray, " C"]:
    """The candidate is the first of its row on its leaf."""
    _, first = np.unique(row * (int(leaf.max(initial=0)) + 1) + leaf, return_index=True)
    fresh = np.zeros(len(leaf), dtype=bool)
    fresh[first] = True
    return fresh


def _row_values(ranks: TargetRanks, width: int) -> tuple[list[str], Float64[np.ndarray, "B M"]]:
    """Every metric of every row."""
    if width < 1:
        raise DataError(f"width = {width}: a list needs at least one candidate; search for more")
    columns: dict[str, np.ndarray] = {}
    for level, rank in (("sid", ranks.sid), ("item", ranks.item)):
        gain = 1 / np.log2(rank + 2.0)
        for k in HIT_RATE_AT:
            columns[f"hr@{k}/{level}"] = np.where(rank < k, 1.0, 0.0)
        for k in NDCG_AT:
            columns[f"ndcg@{k}/{level}"] = np.where(rank < k, gain, 0.0)
    names = [name for name in columns if int(name.split("@")[1].split("/")[0]) <= width]
    return names, np.stack([columns[name] for name in names], axis=1)
