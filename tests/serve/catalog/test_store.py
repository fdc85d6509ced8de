"""Deltas of a served catalog, compared with a catalog built from scratch."""

import numpy as np
import pytest

from orchard.catalog.catalog import from_codes
from orchard.errors import ConfigError
from orchard.settings import FilterConfig
from orchard.testing import TinySetup
from serve.catalog.attributes import check_filters
from serve.catalog.schema import DeltaRequest
from serve.catalog.store import CatalogStore, CatalogVersion
from serve.decoding.recommender import recommend
from serve.errors import ConflictError, UnknownNameError, UnprocessableError
from serve.testing import TinyShop, attributes_of, kind, make_catalog_store, query


def delta(**changes: object) -> DeltaRequest:
    return DeltaRequest.model_validate(changes)


def offered(catalog_version: CatalogVersion) -> dict[int, tuple[list[int], str]]:
    """Return codes and title of every live item."""
    rows = np.flatnonzero(catalog_version.snapshot.live)
    return {
        int(catalog_version.catalog.item_id[r]): (
            catalog_version.plain_sid(int(r)),
            catalog_version.catalog.title[r],
        )
        for r in rows
    }


def test_a_delta_happens_as_a_whole_and_leaves_the_catalog_version_in_use_alone(
    shop: TinyShop,
) -> None:
    catalog_store, before = shop.catalog_store, offered(shop.catalog_store.current)
    new = catalog_store.apply(
        delta(
            add=[{"item_id": 100, "sid": [4, 3, 5], "title": "new"}],
            remove=[2, 7],
            update=[{"item_id": 5, "title": "renamed"}, {"item_id": 6, "sid": [0, 0, 0]}],
        )
    )
    assert offered(catalog_store.current) == before
    catalog_store.activate(new)
    expected = {i: item for i, item in before.items() if i not in (2, 7)}
    expected |= {100: ([4, 3, 5], "new"), 5: (before[5][0], "renamed"), 6: ([0, 0, 0], "")}
    assert offered(catalog_store.current) == expected
    assert (catalog_store.current.version, catalog_store.kept) == (1, [0])
    rebuilt = from_codes(
        [expected[int(i)][0] for i in catalog_store.current.catalog.item_id],
        item_id=catalog_store.current.catalog.item_id,
        level_size=shop.world.catalog.level_size,
    )
    assert catalog_store.current.catalog.digest == rebuilt.digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"remove": [999]}, "item 999 is not in the catalog"),
        ({"add": [{"item_id": 1, "sid": [0, 0, 0]}]}, "identifier that is in use"),
        ({"add": [{"item_id": 100, "sid": [9, 0, 0]}]}, "has code 9 at level 1"),
        ({"add": [{"item_id": 100, "sid": [0, 0]}]}, "depth 2 where 3 was expected"),
        ({"update": [{"item_id": 999, "title": "x"}]}, "999 is not in the catalog"),
        ({"remove": [1], "update": [{"item_id": 1, "title": "x"}]}, "occurs twice in the delta"),
        ({"remove": list(range(40))}, "removes every item"),
        (
            {"update": [{"item_id": 1, "attributes": {"size": 3}}]},
            "attribute size of item 1 is not a column",
        ),
    ],
)
def test_a_delta_that_does_not_fit_is_refused_whole(
    shop: TinyShop, changes: dict[str, object], message: str
) -> None:
    before = offered(shop.catalog_store.current)
    with pytest.raises(UnprocessableError, match=message):
        shop.catalog_store.apply(delta(**changes))
    assert offered(shop.catalog_store.current) == before


def test_an_earlier_version_comes_back_as_a_new_one(shop_world: TinySetup) -> None:
    catalog_store = make_catalog_store(shop_world, keep=2)
    first = offered(catalog_store.current)
    catalog_store.activate(catalog_store.apply(delta(remove=[1])))
    catalog_store.activate(catalog_store.apply(delta(remove=[2], base_version=1)))
    with pytest.raises(ConflictError, match="for version 1, the catalog has 2"):
        catalog_store.apply(delta(remove=[3], base_version=1))
    catalog_store.activate(catalog_store.apply(delta(rollback_to=0)))
    assert offered(catalog_store.current) == first
    assert (catalog_store.current.version, catalog_store.kept) == (3, [1, 2])
    with pytest.raises(UnknownNameError, match="version 0 is not kept; there are 1, 2"):
        catalog_store.apply(delta(rollback_to=0))


def test_attributes_change_at_once_and_new_items_bring_theirs(shop: TinyShop) -> None:
    catalog_store: CatalogStore = shop.catalog_store
    catalog_store.activate(
        catalog_store.apply(
            delta(
                add=[{"item_id": 100, "sid": [1, 0, 1], "attributes": {"stock": True, "price": 1}}],
                update=[{"item_id": item, "attributes": {"stock": False}} for item in range(40)],
            )
        )
    )
    catalog_version = catalog_store.current
    assert catalog_version.catalog.item_id[
        catalog_version.filtered_items(("stocked",)).items
    ].tolist() == [100]
    assert catalog_version.catalog.item_id[
        catalog_version.filtered_items(("stocked", "cheap")).items
    ].tolist() == [100]
    assert catalog_version.filtered_items(("stocked", "red")).total == 0
    shop.engine.set_catalog(catalog_version.catalog)
    (ranked,), _ = recommend(
        shop.engine, catalog_version, [query([100])], kind(filters=("stocked",)), max_history=10
    )
    assert [item.item_id for item in ranked.items] == [100]
    assert (ranked.unknown_items, ranked.shortfall_reason) == (0, "exhausted")


def test_filters_that_cannot_be_applied_are_refused() -> None:
    attributes = attributes_of(4)
    for by, message in (
        (FilterConfig(column="size", value=1), "'size' is not a column"),
        (FilterConfig(column="price", op="in", value=1), "takes a list"),
        (FilterConfig(column="price", value="cheap"), "holds numbers"),
        (FilterConfig(column="colour", op="in", value=("red", 3)), "holds text"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_filters(attributes, {"one": by})
    check_filters(attributes, {"one": FilterConfig(column="colour", op="in", value=("red",))})
