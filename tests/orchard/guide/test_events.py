"""Events added to a guide, against a guide counted anew with them."""

from dataclasses import replace

import numpy as np
import pytest

from orchard import ragged
from orchard.guide import fit
from orchard.guide.events import NONE, Events, with_events
from orchard.guide.expert import LeafRows
from orchard.guide.guide import Guide
from orchard.testing import TinySetup, tiny_setup
from tests.fixtures.guides import random_rows

COUNTED = ("transitions", "cooccurrence", "neighbors")


@pytest.fixture(scope="module")
def world() -> TinySetup:
    return tiny_setup(level_size=(5, 4, 6), num_items=40)


def joined(a: LeafRows, b: LeafRows) -> LeafRows:
    return LeafRows(
        num_leaves=a.num_leaves,
        user=np.concatenate([a.user, b.user + 1000]),
        history=np.concatenate([a.history, b.history]),
        start=np.concatenate([a.start, a.start[-1] + b.start[1:]]),
        target=np.concatenate([a.target, b.target]),
    )


def some_events(world: TinySetup, *, seed: int, count: int = 15) -> Events:
    draw = np.random.default_rng(seed)
    start = ragged.starts(draw.integers(0, 12, count))
    ids = world.catalog.item_id
    return NONE.followed_by(draw.choice(ids, int(start[-1])), start, draw.choice(ids, count))


def dense(guide: Guide, name: str) -> np.ndarray:
    expert = next(one for one in guide.experts if one.name == name)
    size = guide.catalog.trie.num_leaves
    table = np.zeros((size, size))
    table[ragged.row_of(expert.start), expert.after] = expert.strength
    return table


@pytest.mark.parametrize("seed", range(4))
def test_a_guide_with_events_is_that_of_all_rows(world: TinySetup, seed: int) -> None:
    rows, events = random_rows(world.catalog, seed=seed), some_events(world, seed=seed)
    guide = fit.count(world.catalog, rows)
    anew = fit.count(world.catalog, joined(rows, events.rows(world.catalog)))
    learned = with_events(guide, events)
    for name in COUNTED:
        assert np.allclose(dense(learned, name), dense(anew, name), atol=1e-5), name
        assert not np.allclose(dense(guide, name), dense(anew, name), atol=1e-3), name
    assert np.array_equal(dense(learned, "item_knn"), dense(guide, "item_knn"))
    assert np.array_equal(learned.popularity, anew.popularity)


def test_events_one_by_one_are_events_at_once(world: TinySetup) -> None:
    events = some_events(world, seed=1)
    guide, step = fit.count(world.catalog, random_rows(world.catalog, seed=1)), NONE
    for index in range(len(events)):
        part = slice(events.start[index], events.start[index + 1])
        history = events.history[part]
        step = step.followed_by(
            history, np.array([0, len(history)]), events.item[index : index + 1]
        )
    assert step.version == len(events)
    assert np.array_equal(step.history, events.history)
    once, by_one = with_events(guide, events), with_events(guide, step)
    assert once.digest == by_one.digest != guide.digest


def test_leaves_without_events_keep_every_bit(world: TinySetup) -> None:
    guide = fit.count(world.catalog, random_rows(world.catalog, seed=2))
    ids = world.catalog.item_id
    event = NONE.followed_by(ids[:1], np.array([0, 1]), ids[5:6])
    learned = with_events(guide, event)
    touched = {int(leaf) for leaf in world.catalog.leaf_of_item[[0, 5]]}
    for name in COUNTED:
        same = [leaf for leaf in range(world.catalog.trie.num_leaves) if leaf not in touched]
        assert np.array_equal(dense(learned, name)[same], dense(guide, name)[same])


def test_items_that_the_catalog_lacks_wait(world: TinySetup) -> None:
    guide = fit.count(world.catalog, random_rows(world.catalog, seed=2))
    ids = world.catalog.item_id
    unknown = NONE.followed_by(np.array([ids[0], 10**6]), np.array([0, 2]), np.array([10**6 + 1]))
    assert with_events(guide, unknown) is guide
    half = NONE.followed_by(np.array([10**6, ids[0]]), np.array([0, 2]), ids[3:4])
    rows = half.rows(world.catalog)
    assert rows.history.tolist() == [world.catalog.leaf_of_item[0]]
    assert rows.target.tolist() == [world.catalog.leaf_of_item[3]]


def test_forgetting_starts_over_under_a_new_version(world: TinySetup) -> None:
    events, ids = some_events(world, seed=3), world.catalog.item_id
    later = events.followed_by(ids[:1], np.array([0, 1]), ids[1:2], forget=True)
    assert (len(later), later.version) == (1, 2)
    nothing = later.followed_by(ids[:0], np.array([0]), ids[:0], forget=True)
    assert (len(nothing), nothing.version) == (0, 3)


def test_an_expert_of_another_kind_stays_as_it_is(world: TinySetup) -> None:
    guide = fit.count(world.catalog, random_rows(world.catalog, seed=2))
    own = replace(guide.experts[0], name="of_a_plugin")
    terms = tuple(replace(t, expert="of_a_plugin") for t in guide.terms[:1])
    alone = replace(guide, experts=(own,), terms=terms)
    assert with_events(alone, some_events(world, seed=4)).experts == (own,)
