"""Experts against dense sums; bad scores are refused."""

import math

import numpy as np
import pytest

from orchard import ragged
from orchard.catalog.catalog import Catalog
from orchard.errors import ConfigError
from orchard.guide.expert import Expert, distinct, expert_scores


def random_expert(num_leaves: int, seed: int, **reads: float) -> tuple[Expert, np.ndarray]:
    draw = np.random.default_rng(seed)
    dense = draw.random((num_leaves, num_leaves)) * (draw.random((num_leaves, num_leaves)) < 0.2)
    before, after = np.nonzero(dense)
    expert = Expert(
        name=f"random {seed}",
        start=ragged.starts(np.bincount(before, minlength=num_leaves)),
        after=after,
        strength=dense[before, after].astype(np.float32),
        **reads,  # type: ignore[arg-type]
    )
    return expert, dense


def test_scores_are_the_sums_over_the_recent_history() -> None:
    made = [random_expert(12, 0, decay=0.5), random_expert(12, 1, window=2)]
    history, start = np.array([3, 3, 7, 1, 11, 2]), np.array([0, 3, 3, 6])
    scores = expert_scores([e for e, _ in made], history, start, num_leaves=12)
    prompt, leaf = np.repeat(np.arange(3), 12), np.tile(np.arange(12), 3)
    place, found = scores.find(prompt, leaf)
    for column, (expert, dense) in enumerate(made):
        for b in range(3):
            items = history[start[b] : start[b + 1]][::-1][: expert.window]
            wanted = sum((expert.decay**j * dense[a] for j, a in enumerate(items)), np.zeros(12))
            rows = prompt == b
            got = np.where(found[rows], scores.score[place[rows], column], 0.0)
            assert np.allclose(got, wanted, rtol=1e-6)
    assert set(scores.key[scores.seen].tolist()) == {3, 7, 24 + 1, 24 + 11, 24 + 2}
    assert scores.known.tolist() == [True, False, True]


def test_a_leaf_keeps_its_strongest_pairs() -> None:
    expert, dense = random_expert(12, 2)
    kept = expert.strongest(2)
    for leaf in range(12):
        row = slice(kept.start[leaf], kept.start[leaf + 1])
        best = np.argsort(-dense[leaf], kind="stable")[: min(2, (dense[leaf] > 0).sum())]
        assert kept.after[row].tolist() == sorted(best.tolist())
        assert np.allclose(kept.strength[row], dense[leaf][np.sort(best)])
    assert expert.strongest(0) is expert


@pytest.mark.parametrize("score", [-0.1, math.inf, math.nan])
def test_negative_and_infinite_scores_are_refused(score: float) -> None:
    with pytest.raises(ConfigError, match="expert bad gives the score"):
        Expert(
            name="bad",
            start=np.array([0, 1]),
            after=np.array([0]),
            strength=np.array([score], np.float32),
        )


def test_distinct_keys_are_the_same_packed_or_not() -> None:
    key = np.random.default_rng(0).integers(0, 50, 200)
    found, place = distinct(key)
    wide, wide_place = distinct(key << 56)
    assert np.array_equal(found[place], key)
    assert np.array_equal(found, np.unique(key))
    assert np.array_equal(wide >> 56, found)
    assert np.array_equal(place, wide_place)


def test_the_repeat_rate_is_the_share_of_targets_in_their_history(catalog: Catalog) -> None:
    from orchard.guide.expert import LeafRows

    rows = LeafRows(
        num_leaves=9,
        user=np.arange(4),
        history=np.array([1, 2, 2, 5, 6, 5]),
        start=np.array([0, 1, 3, 4, 6]),
        target=np.array([1, 3, 2, 5]),
    )
    assert rows.repeat_rate == 0.5
    assert rows.digest != LeafRows(**{**_fields(rows), "target": np.array([1, 3, 2, 4])}).digest


def _fields(rows: object) -> dict[str, object]:
    return {
        name: getattr(rows, name) for name in ("num_leaves", "user", "history", "start", "target")
    }
