"""Ranks, metrics and intervals against plain loops, and what may be paired with what."""

import json
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchard import ragged
from orchard.errors import DataError
from orchard.evaluation import ranking
from orchard.evaluation.bootstrap import estimates, estimates_over_seeds
from orchard.evaluation.ranking import Evaluation, TargetRanks

MISS = TargetRanks.MISS
examples = settings(max_examples=60)
lists = st.lists(st.lists(st.integers(0, 7), max_size=8), min_size=1, max_size=6)


def flat(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows as one array and starts."""
    values = np.asarray([value for row in rows for value in row], dtype=np.int64)
    return values, ragged.starts(np.asarray([len(row) for row in rows], dtype=np.int64))


def random_ranks(seed: int, *, num_rows: int = 400, hit: float = 0.4) -> TargetRanks:
    draw = np.random.default_rng(seed)
    sid = np.where(draw.random(num_rows) < hit, draw.integers(0, 50, num_rows), MISS)
    return TargetRanks(sid=sid, item=np.where(sid == MISS, MISS, sid + draw.integers(0, 3)))


def plain_metrics(rank: list[int], k: int) -> tuple[float, float]:
    """HR@k and NDCG@k by definition."""
    hits = [r for r in rank if r < k]
    return len(hits) / len(rank), sum(1 / math.log2(r + 2) for r in hits) / len(rank)


@pytest.mark.slow
@examples
@given(lists, st.data())
def test_a_target_ranks_where_it_stands_in_the_written_out_list(
    rows: list[list[int]], data: st.DataObject
) -> None:
    size = data.draw(st.lists(st.integers(1, 3), min_size=8, max_size=8))  # items on each leaf
    target = [data.draw(st.integers(0, 7)) for _ in rows]
    position = [data.draw(st.integers(0, size[leaf] - 1)) for leaf in target]
    leaf, start = flat(rows)
    ranks = ranking.target_ranks(
        leaf=leaf,
        start=start,
        leaf_items=np.asarray(size)[leaf],
        target_leaf=np.asarray(target),
        target_position=np.asarray(position),
    )
    for row, shown in enumerate(rows):
        leaves = list(dict.fromkeys(shown))
        items = [(one, place) for one in leaves for place in range(size[one])]
        wanted = (target[row], position[row])
        assert ranks.sid[row] == (leaves.index(target[row]) if target[row] in leaves else MISS)
        assert ranks.item[row] == (items.index(wanted) if wanted in items else MISS)


def test_metrics_equal_a_plain_loop_at_both_levels() -> None:
    ranks = random_ranks(0)
    found = ranking.metrics(ranks, width=50, resamples=20)
    for level, rank in (("sid", ranks.sid.tolist()), ("item", ranks.item.tolist())):
        for k in (1, 3, 5, 10, 20, 50):
            hit_rate, ndcg = plain_metrics(rank, k)
            assert found[f"hr@{k}/{level}"].mean == pytest.approx(hit_rate, abs=1e-12)
            if k in (3, 5, 10):
                assert found[f"ndcg@{k}/{level}"].mean == pytest.approx(ndcg, abs=1e-12)
    assert len(found) == 2 * (6 + 3)
    assert {estimate.n for estimate in found.values()} == {400}


@pytest.mark.parametrize(("width", "largest"), [(1, 1), (9, 5), (10, 10), (49, 20), (50, 50)])
def test_a_metric_that_looks_beyond_the_beam_is_left_out(width: int, largest: int) -> None:
    found = ranking.metrics(random_ranks(0), width=width, resamples=5)
    assert max(int(name.split("@")[1].split("/")[0]) for name in found) == largest
    assert f"hr@{largest}/sid" in found


@pytest.mark.slow
def test_the_bootstrap_interval_is_the_normal_one_where_both_hold() -> None:
    # 1,500 distinct values and 3,000 resamples: more than are held at once.
    values = np.random.default_rng(1).normal(5.0, 2.0, size=(1500, 1))
    found = estimates(["x"], values, resamples=3000, seed=0)["x"]
    error = values.std() / math.sqrt(len(values))
    assert found.mean == pytest.approx(values.mean())
    # The 2.5 % quantile of 3,000 draws is itself known to about 5 % of the standard error.
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_the_bootstrap_equals_resampling_row_by_row() -> None:
    ranks = random_ranks(2, num_rows=300)
    found = ranking.metrics(ranks, width=50, resamples=20_000)["ndcg@10/sid"]
    gain = np.where(ranks.sid < 10, 1 / np.log2(ranks.sid + 2.0), 0.0)
    draw = np.random.default_rng(9)
    means = gain[draw.integers(300, size=(20_000, 300))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    # Either 2.5 % quantile is known to 2 % of the standard deviation.
    assert found.low == pytest.approx(low, abs=0.1 * means.std())
    assert found.high == pytest.approx(high, abs=0.1 * means.std())


def test_about_nineteen_of_twenty_intervals_hold_the_truth() -> None:
    draw, held = np.random.default_rng(3), 0
    for seed in range(300):
        hits = (draw.random((200, 1)) < 0.3).astype(np.float64)
        found = estimates(["x"], hits, resamples=400, seed=seed)["x"]
        held += found.low <= 0.3 <= found.high
    # 300 intervals of 95 % each hold the truth 285 times, give or take 3.8.
    assert 271 <= held <= 297


def test_equal_seeds_give_equal_intervals_and_other_seeds_others() -> None:
    ranks = random_ranks(4)
    one, same, other = (ranking.metrics(ranks, width=20, seed=seed) for seed in (0, 0, 1))
    assert one == same
    assert one != other


def test_a_paired_difference_is_the_difference_of_the_means() -> None:
    a, b = random_ranks(5), random_ranks(6)
    change = ranking.paired(a, b, width=50)
    back = ranking.paired(b, a, width=50)
    means = [ranking.metrics(ranks, width=50) for ranks in (a, b)]
    for name, estimate in change.items():
        assert estimate.mean == pytest.approx(means[0][name].mean - means[1][name].mean)
        assert estimate.low <= estimate.mean <= estimate.high
        assert back[name].mean == pytest.approx(-estimate.mean)


def test_a_policy_differs_from_itself_by_exactly_nothing() -> None:
    ranks = random_ranks(7)
    for estimate in ranking.paired(ranks, ranks, width=50).values():
        assert (estimate.mean, estimate.low, estimate.high) == (0.0, 0.0, 0.0)
        assert not estimate.significant


def test_pairing_sees_a_small_gain_that_separate_intervals_do_not() -> None:
    worse = random_ranks(8)
    sid = worse.sid.copy()
    sid[np.flatnonzero(sid == MISS)[:12]] = 0  # 12 of 400 rows are found at last
    better = TargetRanks(sid=sid, item=sid)
    apart = [ranking.metrics(r, width=50)["hr@10/sid"] for r in (better, worse)]
    assert apart[0].low < apart[1].high
    assert ranking.paired(better, worse, width=50)["hr@10/sid"].low > 0


@pytest.mark.slow
def test_intervals_of_several_seeds_are_those_of_resampled_rows_and_seeds() -> None:
    draw = np.random.default_rng(4)
    a, b = draw.normal(size=(4, 60, 1)), draw.normal(size=(2, 60, 1))
    a += draw.normal(0, 0.5, size=(4, 1, 1))
    found = estimates_over_seeds(["x"], a, b, resamples=20_000, seed=0)["x"]
    rows = draw.integers(60, size=(20_000, 60))
    sides = [  # [resamples] mean of each side, over its own draw of seeds
        np.stack([values[i][:, r, 0].mean() for i, r in zip(seeds, rows, strict=True)])
        for values in (a, b)
        for seeds in [draw.integers(len(values), size=(20_000, len(values)))]
    ]
    low, high = np.quantile(sides[0] - sides[1], [0.025, 0.975])
    spread = (sides[0] - sides[1]).std()
    assert found.mean == pytest.approx(a.mean() - b.mean())
    assert found.low == pytest.approx(low, abs=0.1 * spread)
    assert found.high == pytest.approx(high, abs=0.1 * spread)


def test_a_gain_that_depends_on_the_seed_is_not_significant() -> None:
    """Resampled rows alone call the mean of three such seeds significant."""
    gain = np.array([0.4, 0.0, -0.1])[:, None, None]
    b = np.random.default_rng(5).normal(0, 0.1, size=(3, 400, 1))
    assert estimates(["x"], (b + gain - b).mean(0) + 0.1 * b[0], resamples=500, seed=0)["x"].low > 0
    found = estimates_over_seeds(["x"], b + gain, b, resamples=500, seed=0)["x"]
    assert found.mean == pytest.approx(0.1)
    assert found.low < 0


def test_seeds_of_two_sides_are_paired_by_order_where_they_are_equally_many() -> None:
    b = np.random.default_rng(6).normal(size=(3, 50, 1)) + np.arange(3)[:, None, None]
    found = estimates_over_seeds(["x"], b + 0.5, b, resamples=500, seed=0)["x"]
    assert (found.low, found.high) == (pytest.approx(0.5), pytest.approx(0.5))


def test_one_seed_on_each_side_is_a_paired_difference() -> None:
    a, b = [random_ranks(seed) for seed in (1, 2, 3)], [random_ranks(seed) for seed in (4, 5)]
    found = ranking.paired_over_seeds(a, b, width=20)["hr@10/sid"]
    hits = [np.mean([r.sid < 10 for r in side]) for side in (a, b)]
    assert found.mean == pytest.approx(hits[0] - hits[1])
    assert found.low < found.mean < found.high
    assert ranking.paired_over_seeds(a[:1], b[:1], width=20) == ranking.paired(a[0], b[0], width=20)


def test_different_rows_are_not_paired() -> None:
    with pytest.raises(DataError, match=r"\[300, 400\] rows; evaluate both sides on the same"):
        ranking.paired(random_ranks(0), random_ranks(0, num_rows=300), width=10)
    with pytest.raises(DataError, match="cannot pair 1 with 0"):
        ranking.paired_over_seeds([random_ranks(0)], [], width=10)


def test_nothing_is_estimated_from_no_rows_or_no_candidates() -> None:
    with pytest.raises(DataError, match="0 rows"):
        ranking.metrics(random_ranks(0, num_rows=0), width=10)
    with pytest.raises(DataError, match="width = 0"):
        ranking.metrics(random_ranks(0), width=0)


@examples
@given(lists, st.integers(1, 4))
def test_coverage_counts_the_leaves_that_some_list_shows_on_top(
    rows: list[list[int]], k: int
) -> None:
    leaf, start = flat(rows)
    shown = {leaf for row in rows for leaf in list(dict.fromkeys(row))[:k]}
    found = ranking.coverage(leaf=leaf, num_leaves=8, start=start, k=k)
    assert found == pytest.approx(len(shown) / 8)


@examples
@given(st.lists(st.lists(st.tuples(*[st.integers(-1, 2)] * 3), max_size=6), min_size=1, max_size=4))
def test_diversity_equals_a_loop_over_all_pairs(rows: list[list[tuple[int, int, int]]]) -> None:
    def distance(a: tuple[int, ...], b: tuple[int, ...]) -> float:
        same = [x == y for x, y in zip(a, b, strict=True)]
        return 1 - (same.index(False) if False in same else len(same)) / len(same)

    pairs = [[distance(*pair) for pair in combinations(row, 2)] for row in rows]
    means = [np.mean(row) for row in pairs if row]
    path = np.asarray([path for row in rows for path in row], dtype=np.int64).reshape(-1, 3)
    start = ragged.starts(np.asarray([len(row) for row in rows]))
    expected = float(np.mean(means)) if means else 0.0
    assert ranking.diversity(path=path, start=start) == pytest.approx(expected)


def an_evaluation(seed: int = 0, *, width: int = 20, num_rows: int = 400) -> Evaluation:
    ranks = random_ranks(seed, num_rows=num_rows)
    return Evaluation(
        metrics=ranking.metrics(ranks, width=width, resamples=50),
        ranks=ranks,
        row=np.arange(num_rows) * 3,
        split="5411",
        width=width,
        seconds=1.5,
        policy="7-0123abcd",
        catalog="feed",
        extra={"coverage@10": 0.25, "forward_tokens": 4e6},
    )


def test_an_evaluation_comes_back_from_its_files_unchanged(tmp_path: Path) -> None:
    before = an_evaluation()
    ranking.write(before, tmp_path / "evaluation" / "trained.json")
    after = ranking.read(tmp_path / "evaluation" / "trained.json")
    for name in ("metrics", "width", "seconds", "policy", "catalog", "split", "extra", "num_rows"):
        assert getattr(after, name) == getattr(before, name)
    for name in ("sid", "item"):
        np.testing.assert_array_equal(getattr(after.ranks, name), getattr(before.ranks, name))
    np.testing.assert_array_equal(after.row, before.row)
    assert sorted(path.name for path in (tmp_path / "evaluation").iterdir()) == [
        "trained.json",
        "trained.parquet",
    ]


def test_the_file_of_an_evaluation_is_plain_json(tmp_path: Path) -> None:
    found = an_evaluation()
    odd = Evaluation(
        **{name: getattr(found, name) for name in Evaluation.__slots__ if name != "extra"},
        extra={"nothing": math.nan},
    )
    ranking.write(odd, tmp_path / "a.json")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    facts = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    assert facts["metrics"]["hr@10/sid"].keys() == {"mean", "low", "high", "n"}
    assert math.isnan(ranking.read(tmp_path / "a.json").extra["nothing"])


def test_two_evaluations_are_compared_up_to_the_narrower_beam() -> None:
    wide, narrow = an_evaluation(0, width=50), an_evaluation(1, width=10)
    change = ranking.difference(wide, narrow)
    assert "hr@10/sid" in change
    assert "hr@20/sid" not in change
    with pytest.raises(DataError, match="400 and 300 rows are not of the same rows"):
        ranking.difference(wide, an_evaluation(2, num_rows=300))


@pytest.mark.parametrize("broken", ["a.json", "a.parquet"])
def test_a_broken_or_missing_file_is_named(tmp_path: Path, broken: str) -> None:
    ranking.write(an_evaluation(), tmp_path / "a.json")
    (tmp_path / broken).write_text('{"metrics"')
    with pytest.raises(DataError, match=r"a\.json .* evaluate again"):
        ranking.read(tmp_path / "a.json")
    (tmp_path / broken).unlink()
    with pytest.raises(DataError, match=r"a\.json .* evaluate again"):
        ranking.read(tmp_path / "a.json")


def test_equal_row_numbers_of_different_splits_are_not_paired() -> None:
    test, valid = an_evaluation(0), replace(an_evaluation(1), split="0a11d")
    assert ranking.difference(test, an_evaluation(1))
    with pytest.raises(DataError, match="different splits, of content 5411 and 0a11d"):
        ranking.difference(test, valid)
    with pytest.raises(DataError, match="does not name the split"):
        ranking.difference(replace(test, split=""), replace(test, split=""))


def test_ranks_of_another_evaluation_are_not_read_as_its_own(tmp_path: Path) -> None:
    ranking.write(an_evaluation(0), tmp_path / "a.json")
    ranking.write(an_evaluation(1), tmp_path / "b.json")
    (tmp_path / "b.parquet").rename(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="those of another evaluation"):
        ranking.read(tmp_path / "a.json")
