"""A guide on a later catalog: the same reward for the same codes, none for new ones."""

from dataclasses import replace

import numpy as np
import pytest

from orchard.catalog.catalog import Catalog
from orchard.catalog.versioned import VersionedCatalog
from orchard.guide.guide import Guide
from orchard.guide.remap import leaf_map, on_catalog
from orchard.testing import tiny_catalog, tiny_prompts
from orchard.types import Prompts
from tests.fixtures.guides import random_guide


def changed(catalog: Catalog, *, seed: int) -> Catalog:
    """Return a catalog with items removed, and items with new and with known codes added."""
    draw, live = np.random.default_rng(seed), VersionedCatalog(catalog)
    live.remove(draw.choice(catalog.item_id, 6, replace=False).tolist())
    plain = [tuple(c for c in row if c >= 0) for row in catalog.plain_codes.tolist()]
    sizes = catalog.plain_level_size
    new = [tuple(draw.integers(size) for size in sizes) for _ in range(8)]
    codes = [tuple(map(int, sid)) for sid in (*new, *plain[:2])]
    live.add(codes, list(range(1000, 1000 + len(codes))))
    live.commit(live.compact())
    return live.snapshot.catalog


def rewards(guide: Guide, prompts: Prompts) -> np.ndarray:
    leaves = guide.catalog.trie.num_leaves
    prompt = np.repeat(np.arange(len(prompts)), leaves)
    return guide.reward(prompts, prompt, np.tile(np.arange(leaves), len(prompts))).reshape(
        len(prompts), leaves
    )


def codes_of_leaves(catalog: Catalog) -> list[tuple[int, ...]]:
    rows = catalog.plain_codes[catalog.item_of_leaf[catalog.leaf_start[:-1]]]
    return [tuple(row) for row in rows.tolist()]


@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_rewards_follow_the_codes(varying: bool, seed: int) -> None:
    old = tiny_catalog(seed=seed, varying_depth=varying)
    new, guide = changed(old, seed=seed), random_guide(old, seed=seed)
    carried = on_catalog(guide, new)
    assert carried.catalog is new
    before, after = codes_of_leaves(old), codes_of_leaves(new)
    assert before != after
    place = {code: leaf for leaf, code in enumerate(after)}
    expected = [place.get(code, -1) for code in before]
    assert leaf_map(old, new).tolist() == expected
    # The same histories, as rows of each catalog; their items are in both.
    prompts = tiny_prompts(old, (0, 3, 1, 5), seed=seed)
    both = np.intersect1d(old.item_id, new.item_id)
    ids = np.random.default_rng(seed).choice(both, len(prompts.history))
    here = rewards(guide, replace(prompts, history=old.rows(ids)))
    there = rewards(carried, replace(prompts, history=new.rows(ids)))
    known = guide.scores(replace(prompts, history=old.rows(ids))).known
    kept = np.array(expected) >= 0
    # A history known only by pairs with leaves that are gone is not known any more.
    still = carried.scores(replace(prompts, history=new.rows(ids))).known
    assert (known >= still).all()
    assert np.array_equal(here[still][:, kept], there[still][:, np.array(expected)[kept]])
    assert not there[~still].any()
    added = np.setdiff1d(np.arange(len(after)), expected)
    assert len(added)
    fresh = replace(carried, seen_weight=0.0)  # no history holds them here anyway
    assert not rewards(fresh, replace(prompts, history=new.rows(ids)))[:, added].any()


def test_the_same_catalog_keeps_the_guide() -> None:
    guide = random_guide(tiny_catalog(seed=1), seed=1)
    assert on_catalog(guide, guide.catalog) is guide
