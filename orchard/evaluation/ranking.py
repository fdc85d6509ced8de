"""Evaluate ranked lists: hit rate, NDCG, coverage and diversity, with confidence intervals.

All metrics of a row follow from two numbers, the rank of its target among the semantic IDs and
among the items, so an evaluation stores ranks, and paired comparisons are computed from them.

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
from blake3 import blake3
from jaxtyping import Bool, Float64, Int, Int64

from orchard import ragged
from orchard.errors import DataError
from orchard.evaluation.bootstrap import Estimate, estimates, estimates_over_seeds
from orchard.folders import atomic_file, atomic_write

HIT_RATE_AT = (1, 3, 5, 10, 20, 50)
NDCG_AT = (3, 5, 10)


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetRanks:
    """Rank of each row's target in its list, 0 for the top."""

    MISS: ClassVar[int] = 2**31 - 1
    """Rank of a target that is not in the list."""

    sid: Int64[np.ndarray, " B"]
    """Rank among the distinct semantic IDs of the list."""
    item: Int64[np.ndarray, " B"]
    """Rank among the items, where each semantic ID expands to all items that have it."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.sid)


def target_ranks(
    *,
    leaf: Int[np.ndarray, " C"],
    start: Int[np.ndarray, " B1"],
    leaf_items: Int[np.ndarray, " C"],
    target_leaf: Int[np.ndarray, " B"],
    target_position: Int[np.ndarray, " B"],
) -> TargetRanks:
    """Compute the rank of each row's target in its list.

    A list has each leaf once: a repeated candidate (i.i.d. sampling) does not count.

    Args:
        leaf: catalog leaf of each candidate, best first within its row.
        start: row b has the candidates `start[b] : start[b + 1]`.
        leaf_items: number of catalog items on each candidate's leaf.
        target_leaf: leaf of the target.
        target_position: index of the target among the items of its leaf.
    """
    prompt_of = ragged.row_of(start)
    is_first = _fresh(leaf, prompt_of)
    # distinct leaves, and their items, before each candidate in the concatenation of all lists
    leaves_before = ragged.starts(is_first.astype(np.int64))
    items_before = ragged.starts(np.where(is_first, leaf_items, 0))
    hit_index = np.flatnonzero(is_first & (leaf == target_leaf[prompt_of]))
    hit_rows = prompt_of[hit_index]
    sid = np.full(len(target_leaf), TargetRanks.MISS, dtype=np.int64)
    item = sid.copy()
    sid[hit_rows] = leaves_before[hit_index] - leaves_before[start[hit_rows]]
    item[hit_rows] = (
        items_before[hit_index] - items_before[start[hit_rows]] + target_position[hit_rows]
    )
    return TargetRanks(sid=sid, item=item)


def metrics(
    ranks: TargetRanks, *, width: int, resamples: int = 2000, seed: int = 0
) -> dict[str, Estimate]:
    """Compute HR@k and NDCG@k, named `hr@10/sid`, `ndcg@10/item` and so on.

    A metric whose k exceeds `width`, the number of candidates of a search, is omitted, since a
    shorter list would understate it.

    Raises:
        DataError: there are no rows, or `width` or `resamples` is not positive.
    """
    names, values = _row_values(ranks, width)
    return estimates(names, values, resamples=resamples, seed=seed)


def paired(
    a: TargetRanks, b: TargetRanks, *, width: int, resamples: int = 2000, seed: int = 0
) -> dict[str, Estimate]:
    """Estimate mean(a) - mean(b) of every metric, with both sides resampled on the same rows.

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
    """Estimate the paired difference of two recipes that were each run with several seeds.

    The interval covers the choice of rows and of seeds (`bootstrap.estimates_over_seeds`): sides
    with equally many seeds are paired by their order.

    Raises:
        DataError: a side is empty, row counts differ, there are no rows, or `width` or `resamples`
            is not positive.
    """
    sizes = sorted({len(ranks) for ranks in (*a, *b)})
    if not a or not b or len(sizes) != 1:
        raise DataError(
            f"cannot pair {len(a)} with {len(b)} evaluations of {sizes} rows; "
            "evaluate both sides on the same rows of one split"
        )
    names, _ = _row_values(a[0], width)
    left, right = (np.stack([_row_values(ranks, width)[1] for ranks in side]) for side in (a, b))
    if len(a) == len(b) == 1:
        return estimates(names, left[0] - right[0], resamples=resamples, seed=seed)
    return estimates_over_seeds(names, left, right, resamples=resamples, seed=seed)


def coverage(
    *, leaf: Int[np.ndarray, " C"], num_leaves: int, start: Int[np.ndarray, " B1"], k: int
) -> float:
    """Return the share of the catalog's leaves that are among the first k of any list."""
    prompt_of = ragged.row_of(start)
    is_first = _fresh(leaf, prompt_of)
    leaves_before = ragged.starts(is_first.astype(np.int64))
    is_shown = is_first & (leaves_before[:-1] - leaves_before[start[prompt_of]] < k)
    return len(np.unique(leaf[is_shown])) / num_leaves


def diversity(*, path: Int[np.ndarray, "C L"], start: Int[np.ndarray, " B1"]) -> float:
    """Average 1 - LCP / L over all pairs of candidates of a row, then over rows.

    LCP is the length of the longest common prefix of two paths (codes or trie nodes, padded with
    any constant). The result is 1 if all first steps differ and 0 if all candidates are equal. Rows
    with fewer than two candidates have no pairs and do not count; it is 0 if no row has two.
    """
    size, prompt_of = np.diff(start), ragged.row_of(start)
    num_pairs = size * (size - 1) / 2
    sorted_path = path[np.lexsort((*path.T[::-1], prompt_of))]
    is_start = np.ones(len(path), dtype=bool)  # whether a group of equal prefixes starts
    is_start[1:] = prompt_of[1:] != prompt_of[:-1]
    lcp_sum = np.zeros(len(size))
    # A pair shares its first l steps iff both are in one group of prefixes of length l, so the
    # number of pairs per group, summed over all lengths, is the sum of LCPs over all pairs.
    for step in sorted_path.T:
        is_start[1:] |= step[1:] != step[:-1]
        group_start = np.flatnonzero(is_start)
        members = np.diff(group_start, append=len(path))
        lcp_sum += np.bincount(
            prompt_of[group_start], members * (members - 1) / 2, minlength=len(size)
        )
    has_pairs = num_pairs > 0
    if not has_pairs.any():
        return 0.0
    return float(np.mean(1 - lcp_sum[has_pairs] / num_pairs[has_pairs] / path.shape[1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Evaluation of one policy on one set of rows."""

    metrics: Mapping[str, Estimate]
    ranks: TargetRanks
    row: Int64[np.ndarray, " B"]
    """Row numbers in the split, by which evaluations are paired."""
    split: str
    """Digest of the split's content, without which equal row numbers mean nothing; empty in files
    that were written before evaluations named it."""
    width: int
    """Number of candidates of a search, per row."""
    seconds: float
    """Wall time of the evaluation."""
    policy: str
    """Version of the policy."""
    catalog: str
    """Digest of the catalog."""
    extra: Mapping[str, float] = field(default_factory=dict[str, float])
    """Further scalars such as coverage, diversity and forward tokens."""
    search: Mapping[str, str] = field(default_factory=dict[str, str])
    """Settings besides the width that the candidates depend on."""

    @property
    def num_rows(self) -> int:
        """Number of rows evaluated."""
        return len(self.ranks)


def difference(a: Evaluation, b: Evaluation) -> dict[str, Estimate]:
    """Estimate paired differences of two evaluations, for metrics within the width of both.

    Raises:
        DataError: the evaluations are not known to be of the same rows of the same split.
    """
    check_paired(a, split=b.split, row=b.row)
    return paired(a.ranks, b.ranks, width=min(a.width, b.width), resamples=2000, seed=0)


def check_paired(evaluation: Evaluation, *, split: str, row: Int64[np.ndarray, " B"]) -> None:
    """Check that an evaluation was made on these rows of the split with this digest.

    Raises:
        DataError: it was made on others, or does not name its split.
    """
    if not evaluation.split or not split:
        raise DataError(
            "an evaluation does not name the split that it was made on, since an earlier version "
            "wrote it; evaluate again"
        )
    if evaluation.split != split:
        raise DataError(
            f"the evaluations are of different splits, of content {evaluation.split[:12]} and "
            f"{split[:12]}: row n of one is not row n of the other; evaluate both on the same file"
        )
    if not np.array_equal(evaluation.row, row):
        raise DataError(
            f"evaluations of {evaluation.num_rows} and {len(row)} rows are not of the same rows; "
            "evaluate both on the same rows of one split"
        )


def write(evaluation: Evaluation, path: Path) -> None:
    """Write JSON to `path` and the ranks to a Parquet file of that name: row, rank_sid, rank_item.

    Both files are written atomically, the JSON file last, so a JSON file always has its ranks.
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
        "split": evaluation.split,
        "ranks": _ranks_digest(evaluation.row, evaluation.ranks),
        "search": dict(evaluation.search),
        "num_rows": evaluation.num_rows,
        "width": evaluation.width,
        "seconds": evaluation.seconds,
        # JSON knows no NaN or infinity.
        "extra": {n: v if math.isfinite(v) else None for n, v in evaluation.extra.items()},
    }
    with atomic_file(path.with_suffix(".parquet")) as partial:
        pq.write_table(table, partial, compression="zstd")
    atomic_write(path, json.dumps(facts, indent=2, allow_nan=False) + "\n")


def read(path: Path) -> Evaluation:
    """Read an evaluation saved by `write`.

    Raises:
        DataError: either file is missing or malformed.
    """
    try:
        facts: dict[str, Any] = json.loads(path.read_text())
        table = pq.read_table(path.with_suffix(".parquet"))
        row, sid, item = (
            table[name].to_numpy().astype(np.int64) for name in ("row", "rank_sid", "rank_item")
        )
        ranks = TargetRanks(sid=sid, item=item)
        if facts.get("ranks", found := _ranks_digest(row, ranks)) != found:
            raise ValueError("the ranks in the Parquet file are those of another evaluation")
        return Evaluation(
            metrics={name: Estimate(**value) for name, value in facts["metrics"].items()},
            ranks=ranks,
            row=row,
            split=facts.get("split", ""),
            width=facts["width"],
            seconds=facts["seconds"],
            policy=facts["policy"],
            catalog=facts["catalogue"],
            extra={n: math.nan if v is None else v for n, v in facts["extra"].items()},
            search=facts.get("search", {}),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"evaluation {path} and its Parquet file cannot be read "
            f"({type(error).__name__}: {error}); evaluate again"
        ) from error


def _ranks_digest(row: Int64[np.ndarray, " B"], ranks: TargetRanks) -> str:
    """Return the BLAKE3 digest of rows and ranks, which ties the two files of an evaluation."""
    hasher = blake3()
    for column in (row, ranks.sid, ranks.item):
        hasher.update(column.astype(np.int64).tobytes())
    return hasher.hexdigest()


def _fresh(leaf: Int[np.ndarray, " C"], row: Int[np.ndarray, " C"]) -> Bool[np.ndarray, " C"]:
    """Return whether each candidate is the first of its row on its leaf."""
    _, first = np.unique(row * (int(leaf.max(initial=0)) + 1) + leaf, return_index=True)
    is_first = np.zeros(len(leaf), dtype=bool)
    is_first[first] = True
    return is_first


def _row_values(ranks: TargetRanks, width: int) -> tuple[list[str], Float64[np.ndarray, "B M"]]:
    """Compute every metric of every row; return metric names and values."""
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
