"""A catalogue that is changed while it is served, against one made anew."""

import numpy as np
import pytest

from orchard.catalog.catalog import from_codes
from orchard.errors import ConfigError
from orchard.settings import FilterConfig
from orchard.testing import World
from serve.catalog.attributes import check_filters
from serve.catalog.store import Shelf, Stock
from serve.decoding.recommender import recommend
from serve.errors import ConflictError, UnknownNameError, UnsuitableError
from serve.schema import DeltaRequest
from serve.testing import Shop, attributes_of, kind, make_stock, query


def delta(**changes: object) -> DeltaRequest:
    return DeltaRequest.model_validate(changes)


def offered(shelf: Shelf) -> dict[int, tuple[list[int], str]]:
    """Codes and title of every live item."""
    rows = np.flatnonzero(shelf.snapshot.live)
    return {
        int(shelf.catalogue.item_id[r]): (shelf.plain_sid(int(r)), shelf.catalogue.title[r])
        for r in rows
    }


def test_a_delta_happens_as_a_whole_and_leaves_the_shelf_in_use_alone(shop: Shop) -> None:
    stock, before = shop.stock, offered(shop.stock.shelf)
    new = stock.after(
        delta(
            add=[{"item_id": 100, "sid": [4, 3, 5], "title": "new"}],
            remove=[2, 7],
            update=[{"item_id": 5, "title": "renamed"}, {"item_id": 6, "sid": [0, 0, 0]}],
        )
    )
    assert offered(stock.shelf) == before
    stock.put(new)
    expected = {i: one for i, one in before.items() if i not in (2, 7)}
    expected |= {100: ([4, 3, 5], "new"), 5: (before[5][0], "renamed"), 6: ([0, 0, 0], "")}
    assert offered(stock.shelf) == expected
    assert (stock.shelf.version, stock.kept) == (1, [0])
    made_anew = from_codes(
        [expected[int(i)][0] for i in stock.shelf.catalogue.item_id],
        item_id=stock.shelf.catalogue.item_id,
        level_size=shop.world.catalogue.level_size,
    )
    assert stock.shelf.catalogue.digest == made_anew.digest


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"remove": [999]}, "item 999 is not in the catalogue"),
        ({"add": [{"item_id": 1, "sid": [0, 0, 0]}]}, "identifier that is in use"),
        ({"add": [{"item_id": 100, "sid": [9, 0, 0]}]}, "has code 9 at level 1"),
        ({"add": [{"item_id": 100, "sid": [0, 0]}]}, "depth 2 where 3 was expected"),
        ({"update": [{"item_id": 999, "title": "x"}]}, "999 is to be changed and is not"),
        ({"remove": [1], "update": [{"item_id": 1, "title": "x"}]}, "occurs twice in the delta"),
        ({"remove": list(range(40))}, "removes every item"),
        (
            {"update": [{"item_id": 1, "attributes": {"size": 3}}]},
            "attribute size of item 1 is no column",
        ),
    ],
)
def test_a_delta_that_does_not_fit_is_refused_whole(
    shop: Shop, changes: dict[str, object], said: str
) -> None:
    before = offered(shop.stock.shelf)
    with pytest.raises(UnsuitableError, match=said):
        shop.stock.after(delta(**changes))
    assert offered(shop.stock.shelf) == before


def test_an_earlier_version_comes_back_as_a_new_one(shop_world: World) -> None:
    stock = make_stock(shop_world, keep=2)
    first = offered(stock.shelf)
    stock.put(stock.after(delta(remove=[1])))
    stock.put(stock.after(delta(remove=[2], base_version=1)))
    with pytest.raises(ConflictError, match="for version 1, the catalogue has 2"):
        stock.after(delta(remove=[3], base_version=1))
    stock.put(stock.after(delta(rollback_to=0)))
    assert offered(stock.shelf) == first
    assert (stock.shelf.version, stock.kept) == (3, [1, 2])
    with pytest.raises(UnknownNameError, match="version 0 is not kept; there are 1, 2"):
        stock.after(delta(rollback_to=0))


def test_attributes_change_at_once_and_new_items_bring_theirs(shop: Shop) -> None:
    stock: Stock = shop.stock
    stock.put(
        stock.after(
            delta(
                add=[{"item_id": 100, "sid": [1, 0, 1], "attributes": {"stock": True, "price": 1}}],
                update=[{"item_id": item, "attributes": {"stock": False}} for item in range(40)],
            )
        )
    )
    shelf = stock.shelf
    assert shelf.catalogue.item_id[shelf.offer(("stocked",)).items].tolist() == [100]
    assert shelf.catalogue.item_id[shelf.offer(("stocked", "cheap")).items].tolist() == [100]
    assert shelf.offer(("stocked", "red")).total == 0
    shop.engine.turn_to(shelf.catalogue.trie)
    (found,), _ = recommend(
        shop.engine, shelf, [query([100])], kind(filters=("stocked",)), max_history=10
    )
    assert [item.item_id for item in found.items] == [100]
    assert (found.unknown, found.fewer) == (0, "exhausted")


def test_filters_that_cannot_be_applied_are_refused() -> None:
    attributes = attributes_of(4)
    for by, said in (
        (FilterConfig(column="size", value=1), "'size' is no column"),
        (FilterConfig(column="price", op="in", value=1), "takes a list"),
        (FilterConfig(column="price", value="cheap"), "holds numbers"),
        (FilterConfig(column="colour", op="in", value=("red", 3)), "holds text"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_filters(attributes, {"one": by})
    check_filters(attributes, {"one": FilterConfig(column="colour", op="in", value=("red",))})
