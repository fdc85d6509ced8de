"""Ranked items compared with an enumeration of the whole catalog."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from orchard.catalog.catalog import Catalog
from serve.decoding.recommender import places_among, popular_items, read_queries, recommend
from serve.decoding.trace import Trace, draw_tree
from serve.errors import UnprocessableError
from serve.testing import FILTERS, TinyShop, kind, query
from tests.fixtures.guides import random_guide

HISTORY = [3, 17, 5]
some = st.lists(st.integers(0, 45), max_size=60)
examples = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])


def passing(shop: TinyShop, names: list[str]) -> set[int]:
    """Return the items that pass all filters, by plain comparisons."""
    column = shop.catalog_store.current.attributes.column
    tests: dict[str, Callable[[Any], bool]] = {
        "price": lambda v: v < 5, "colour": lambda v: v == "red", "stock": bool,
    }  # fmt: skip
    return {
        item
        for item in range(len(shop.world.catalog))
        if all(
            column[FILTERS[n].column][1][item]
            and tests[FILTERS[n].column](column[FILTERS[n].column][0][item])
            for n in names
        )
    }


def ranked_by(key: np.ndarray, allowed: set[int], catalog: Catalog, cap: int | None) -> list[int]:
    """Return the allowed items by the key of their leaf, at most `cap` of one first code."""
    expected: list[int] = []
    for item in sorted(allowed, key=lambda i: (-key[catalog.leaf_of_item[i]], i)):
        same_code = sum(catalog.codes[o, 0] == catalog.codes[item, 0] for o in expected)
        if cap is None or same_code < cap:
            expected.append(item)
    return expected


@pytest.mark.slow
@examples
@given(
    exclude=some,
    names=st.lists(st.sampled_from(sorted(FILTERS)), max_size=3),
    k=st.integers(1, 60),
    cap=st.none() | st.integers(1, 4),
)
def test_an_answer_is_the_ranking_of_all_items_less_those_excluded(
    shop: TinyShop,
    leaf_logprob: Callable[[list[int]], np.ndarray],
    exclude: list[int],
    names: list[str],
    k: int,
    cap: int | None,
) -> None:
    single = query(HISTORY, k=k, exclude=np.array(exclude, np.int64), per_prefix=cap)
    (ranked,), _ = recommend(
        shop.engine,
        shop.catalog_store.current,
        [single],
        kind(filters=tuple(names)),
        max_history=10,
    )
    catalog, score = shop.world.catalog, leaf_logprob(HISTORY)
    allowed = passing(shop, names) - set(exclude)
    expected = ranked_by(score, allowed, catalog, cap)
    assert [item.item_id for item in ranked.items] == expected[:k]
    for item in ranked.items:
        assert item.score == pytest.approx(score[catalog.leaf_of_item[item.item_id]], abs=1e-4)
        assert item.sid == catalog.codes[item.item_id].tolist()
    assert (ranked.shortfall_reason == "") == (len(ranked.items) == k)
    if len(ranked.items) < k:
        is_exhausted = len(ranked.items) == len(allowed)
        assert ranked.shortfall_reason == ("exhausted" if is_exhausted else "per_prefix")


@pytest.mark.slow
@example(exclude=[], names=[], k=2, cap=None, width=1, seed=0, wide=50)
@examples
@given(
    exclude=some,
    names=st.lists(st.sampled_from(sorted(FILTERS)), max_size=3),
    k=st.integers(1, 60),
    cap=st.none() | st.integers(1, 4),
    width=st.integers(1, 50),
    seed=st.integers(0, 100),
    wide=st.sampled_from([0, 50]),
)
def test_a_guided_answer_that_is_proved_is_the_ranking_by_score_and_reward(
    shop: TinyShop,
    leaf_logprob: Callable[[list[int]], np.ndarray],
    exclude: list[int],
    names: list[str],
    k: int,
    cap: int | None,
    width: int,
    seed: int,
    wide: int,
) -> None:
    catalog, guide = shop.world.catalog, random_guide(shop.world.catalog, seed=seed)
    single = query(HISTORY, k=k, exclude=np.array(exclude, np.int64), per_prefix=cap)
    version = shop.catalog_store.current
    (ranked,), _ = recommend(
        shop.engine,
        version,
        [single],
        kind(decoder="guided", filters=tuple(names), width=width, wide=wide, prove=k),
        max_history=10,
        guide=guide,
    )
    score, leaves = leaf_logprob(HISTORY), np.arange(catalog.trie.num_leaves)
    prompts, _ = read_queries(version, [single], 10)
    key = score + guide.reward(prompts, np.zeros_like(leaves), leaves)
    allowed = passing(shop, names) - set(exclude)
    expected = ranked_by(key, allowed, catalog, cap)
    got = [item.item_id for item in ranked.items]
    assert ranked.proved is not None
    if max(width, wide) == 50 and cap is None:  # wider than the catalog
        assert ranked.proved
    if ranked.proved:
        assert [key[catalog.leaf_of_item[i]] for i in got] == pytest.approx(
            [key[catalog.leaf_of_item[i]] for i in expected[:k]], abs=1e-4
        )
    assert set(got) <= allowed
    for item in ranked.items:  # the policy's own score
        assert item.score == pytest.approx(score[catalog.leaf_of_item[item.item_id]], abs=1e-4)


def test_a_guided_answer_explains_the_share_of_every_expert(shop: TinyShop) -> None:
    guide = random_guide(shop.world.catalog, seed=3)
    queries = [query(HISTORY, levels=True, explain=True), query(HISTORY, levels=True), query([])]
    (told, plain, unknown), _ = recommend(
        shop.engine,
        shop.catalog_store.current,
        queries,
        kind(decoder="guided", prove=10),
        max_history=10,
        guide=guide,
    )
    assert [i.item_id for i in told.items] == [i.item_id for i in plain.items]
    assert all(item.guide is None for item in (*plain.items, *unknown.items))
    ranks: list[float] = []
    for item in told.items:
        assert item.guide is not None
        assert set(item.guide.summands) == set(guide.summands)
        assert sum(item.guide.summands.values()) == pytest.approx(item.guide.reward)
        assert item.levels is not None
        values = [level.value for level in item.levels]
        assert all(value is not None for value in values)
        assert values == sorted(values, reverse=True)  # pyright: ignore[reportArgumentType]
        assert values[-1] == pytest.approx(item.guide.reward, abs=1e-5)
        ranks.append((item.score or 0.0) + item.guide.reward)
    assert ranks == sorted(ranks, reverse=True)
    assert len(set(ranks)) > 1


@pytest.mark.parametrize("decoder", ["beam", "beam_sample", "ved", "guided"])
def test_an_answer_does_not_depend_on_its_batch(shop: TinyShop, decoder: str) -> None:
    queries = [
        query(HISTORY, seed=7),
        query([], seed=8, exclude=np.arange(20)),
        query([1, 2, 3, 4, 5, 6, 7, 8], seed=9, k=3, levels=True),
    ]
    key, guide = kind(decoder=decoder, width=8), random_guide(shop.world.catalog, seed=1)
    catalog_version = shop.catalog_store.current
    together, _ = recommend(shop.engine, catalog_version, queries, key, max_history=4, guide=guide)
    for single, in_batch in zip(queries, together, strict=True):
        (alone,), _ = recommend(
            shop.engine, catalog_version, [single], key, max_history=4, guide=guide
        )
        assert [i.item_id for i in alone.items] == [i.item_id for i in in_batch.items]
        assert [i.score for i in alone.items] == pytest.approx(
            [i.score for i in in_batch.items], abs=1e-5
        )


def test_levels_add_up_to_the_score_and_guided_searches_tell_values(shop: TinyShop) -> None:
    single = query(HISTORY, levels=True)
    (ranked,), _ = recommend(
        shop.engine,
        shop.catalog_store.current,
        [single],
        kind(decoder="ved", width=12),
        max_history=10,
    )
    assert ranked.items
    for item in ranked.items:
        assert item.levels is not None
        assert [level.code for level in item.levels] == item.sid
        assert sum(level.logprob for level in item.levels) == pytest.approx(item.score, abs=1e-5)
    assert any(level.value is not None for i in ranked.items for level in i.levels or [])


def test_unknown_items_of_a_history_are_passed_over_and_counted(shop: TinyShop) -> None:
    catalog_version = shop.catalog_store.current
    (with_unknown, plain), _ = recommend(
        shop.engine,
        catalog_version,
        [query([900, 3, -5, 17, 5]), query(HISTORY)],
        kind(),
        max_history=10,
    )
    assert with_unknown.unknown_items == 2
    assert plain.unknown_items == 0
    assert [i.item_id for i in with_unknown.items] == [i.item_id for i in plain.items]


def test_a_beam_narrower_than_the_list_says_so(shop: TinyShop) -> None:
    (ranked,), _ = recommend(
        shop.engine,
        shop.catalog_store.current,
        [query(HISTORY)],
        kind(width=2),
        max_history=10,
    )
    assert ranked.shortfall_reason == "width"
    assert len(ranked.items) >= 2


def test_a_filter_that_does_not_exist_is_named(shop: TinyShop) -> None:
    with pytest.raises(UnprocessableError, match=r"no filter 'blue'; known: cheap, red"):
        recommend(
            shop.engine,
            shop.catalog_store.current,
            [query([])],
            kind(filters=("blue",)),
            max_history=10,
        )


def test_the_fallback_shows_what_is_popular_and_allowed(shop: TinyShop) -> None:
    ranked = popular_items(shop.catalog_store.current, query([], k=4, exclude=np.array([1])), ())
    assert [item.item_id for item in ranked.items] == [3, 4, 0, 2]
    assert ranked.items[0].score is None
    everything = popular_items(
        shop.catalog_store.current, query([], k=50, exclude=np.arange(39)), ("stocked",)
    )
    assert {i.item_id for i in everything.items} <= {39}
    assert everything.shortfall_reason == "exhausted"


def test_a_tree_shows_what_was_kept_and_what_was_pruned(shop: TinyShop) -> None:
    catalog_version, single = shop.catalog_store.current, query(HISTORY, k=3)
    trace = Trace(record_steps=True)
    (ranked,), candidates = recommend(
        shop.engine, catalog_version, [single], kind(width=3), max_history=10, trace=trace
    )
    nodes = draw_tree(catalog_version, candidates, trace.steps, ranked.leaf)
    node_of = {node.id: node for node in nodes}
    assert [n.id for n in nodes if n.parent == -1] == [0]
    for node in nodes[1:]:
        assert node.score == pytest.approx(node_of[node.parent].score + node.logprob, abs=1e-5)
        assert not node.kept or node_of[node.parent].kept
    ends = {n.item_id: n for n in nodes if n.item_id is not None and n.kept}
    for item in ranked.items:
        if item.item_id in ends:
            assert ends[item.item_id].score == pytest.approx(item.score, abs=1e-5)
    assert any(not node.kept for node in nodes)
    assert trace.prefill_s > 0


def test_places_count_earlier_members_of_the_group() -> None:
    assert places_among(np.array([2, 2, 0, 2, 0])).tolist() == [0, 1, 0, 2, 1]
    assert places_among(np.zeros(0, np.int64)).tolist() == []
