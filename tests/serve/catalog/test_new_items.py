"""New items get semantic IDs by the bundle, and everything else sees ordinary deltas."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from orchard.catalog.catalog import Catalog, from_codes
from orchard.policy.item_tokenizer import compact_tokenizer, make_item_tokenizer
from orchard.semantic_ids.bundle import Bundle
from serve.catalog.attributes import NOTHING
from serve.catalog.new_items import Assigner
from serve.catalog.schema import AssignedItem, DeltaRequest
from serve.catalog.store import CatalogStore
from serve.errors import ConflictError, UnprocessableError
from tests.fixtures.bundles import WIDTH, write_shop

VECTOR = np.random.default_rng(11).standard_normal((20, WIDTH)).astype(np.float32)


def store_of(bundle: Bundle | None, catalog: Catalog | None = None, **changes: Any) -> CatalogStore:
    """Serve the items of a bundle."""
    if catalog is None:
        assert bundle is not None
        catalog = from_codes(
            bundle.table.sid,
            item_id=bundle.table.item_id,
            level_size=bundle.description.level_size,
        )
    return CatalogStore(
        make_item_tokenizer(compact_tokenizer(catalog), catalog),
        attributes=NOTHING, filters={}, popularity={}, keep=3,
        assigner=Assigner(bundle=bundle, **changes),
    )  # fmt: skip


def delta(**changes: Any) -> DeltaRequest:
    return DeltaRequest.model_validate(changes)


def new(item_id: int, vector: np.ndarray, **more: Any) -> dict[str, Any]:
    return {"item_id": item_id, "embedding": [float(x) for x in vector], **more}


def changed(store: CatalogStore, **changes: Any) -> list[AssignedItem]:
    """Apply a delta as the endpoint does; return what was assigned."""
    resolved, assigned = store.with_sids(delta(**changes))
    assert all(item.sid is not None and item.embedding is None for item in resolved.add)
    store.activate(store.apply(resolved))
    return assigned


def sids(store: CatalogStore) -> dict[int, tuple[int, ...]]:
    version = store.current
    rows = np.flatnonzero(version.snapshot.live).tolist()
    return {int(version.catalog.item_id[r]): tuple(version.plain_sid(r)) for r in rows}


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_shop(tmp_path_factory.mktemp("embedded") / "shop", embedded=True)


@pytest.fixture(scope="module")
def titled(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_shop(tmp_path_factory.mktemp("titled") / "shop")


def test_a_new_item_takes_the_nearest_free_code_and_says_how_near(embedded: Bundle) -> None:
    store, before = store_of(embedded), sids(store_of(embedded))
    (item,) = changed(store, add=[new(900, VECTOR[0], title="new")])
    after = sids(store)
    assert after == before | {900: tuple(item.sid)}
    assert len(set(after.values())) == len(after)
    point = VECTOR[0] - embedded.projection.mean
    first, second = embedded.books
    assert item.sid[0] == ((point - first) ** 2).sum(axis=1).argmin()
    to_codes = ((point - first[item.sid[0]] - second) ** 2).sum(axis=1)
    used = [sid[1] for sid in before.values() if sid[0] == item.sid[0]]
    free = np.setdiff1d(np.arange(40), used)
    assert item.sid[1] == free[to_codes[free].argmin()]
    assert item.moved == (to_codes.argmin() in used)
    assert item.distance == pytest.approx(np.sqrt(to_codes[item.sid[1]]), rel=1e-5)
    typical = np.sqrt(embedded.table.distance.mean())
    assert item.typical_distance == pytest.approx(typical, rel=1e-5)
    stands_for = first[embedded.table.quantized[:, 0]] + second[embedded.table.quantized[:, 1]]
    far = np.linalg.norm(point - stands_for, axis=1)
    assert [n.item_id for n in item.neighbors] == embedded.table.item_id[
        np.argsort(far, kind="stable")[:5]
    ].tolist()
    assert [n.distance for n in item.neighbors] == pytest.approx(np.sort(far)[:5], abs=1e-5)
    assert (item.source, item.shared) == ("bundle", False)


def test_a_removed_item_comes_back_with_its_id_which_nobody_took(embedded: Bundle) -> None:
    store = store_of(embedded)
    (first,) = changed(store, add=[new(900, VECTOR[0])])
    changed(store, remove=[900, 8])
    gone = embedded.table.sid[embedded.table.item_id == 8][0].tolist()
    (twin,) = changed(store, add=[new(901, VECTOR[0])])
    assert twin.sid != first.sid
    # By another embedding, or by none: the ID stays.
    back = changed(store, add=[new(900, VECTOR[5]), {"item_id": 8}])
    assert [item.sid for item in back] == [first.sid, gone]
    assert {item.source for item in back} == {"kept"}
    assert all(item.distance is None and item.neighbors == [] for item in back)
    assert not store.current.retired
    # An item that was moved by hand keeps what it had last.
    changed(store, update=[{"item_id": 900, "sid": [0, 39]}])
    changed(store, remove=[900])
    assert changed(store, add=[{"item_id": 900}])[0].sid == [0, 39]


def test_a_rollback_forgets_what_it_takes_back(embedded: Bundle) -> None:
    store = store_of(embedded)
    (first,) = changed(store, add=[new(900, VECTOR[0])])
    changed(store, rollback_to=0)
    (again,) = changed(store, add=[new(901, VECTOR[0])])
    assert again.sid == first.sid
    (other,) = changed(store, add=[new(900, VECTOR[3])])
    assert other.source == "bundle"


def test_a_replica_that_reads_the_deltas_reaches_the_same_catalog_and_memory(
    embedded: Bundle,
) -> None:
    store, replica = store_of(embedded), store_of(embedded)
    for changes in (
        {"add": [new(900, VECTOR[0]), new(901, VECTOR[1], title="b")]},
        {"remove": [900]},
        {"add": [new(902, VECTOR[0])], "remove": [9]},
    ):
        resolved, _ = store.with_sids(delta(**changes))
        store.activate(store.apply(resolved))
        read = DeltaRequest.model_validate(resolved.model_dump(exclude_defaults=True))
        replica.activate(replica.replay(read, lambda _: []))
    assert replica.current.digest == store.current.digest
    assert replica.current.retired == store.current.retired
    assert set(store.current.retired) == {900, 9}


def test_items_of_one_delta_and_of_two_at_once_get_ids_of_their_own(titled: Bundle) -> None:
    store, title = store_of(titled), "red oak lamp"
    both = changed(store, add=[{"item_id": i, "title": title} for i in (900, 901)])
    later = changed(store, add=[{"item_id": 902, "title": title}])
    assert len({tuple(item.sid) for item in (*both, *later)}) == 3
    assert len({item.sid[0] for item in (*both, *later)}) == 1
    # An explicit ID of the same delta is in the way, too.
    probe, _ = store_of(titled).with_sids(delta(add=[{"item_id": 900, "title": title}]))
    wanted = probe.add[0].sid
    mixed = changed(
        store_of(titled),
        add=[{"item_id": 900, "title": title}, {"item_id": 901, "sid": wanted}],
    )
    assert mixed[0].sid != wanted
    with pytest.raises(ConflictError, match="for version 0, the catalog has 2"):
        store.with_sids(delta(add=[{"item_id": 903, "title": title}], base_version=0))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"title": "wolpertinger"}, "no word of the title of item 900 is in the vocabulary"),
        ({"title": "  "}, "item 900 has neither sid nor title"),
        ({}, "item 900 has neither sid nor title"),
        ({"title": "red oak", "embedding": [1.0] * 8}, "embeds titles itself; send its title"),
    ],
)
def test_a_title_that_says_nothing_is_refused(
    titled: Bundle, item: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnprocessableError, match=message) as caught:
        store_of(titled).with_sids(delta(add=[{"item_id": 900, **item}]))
    assert "/" not in str(caught.value)


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        ([0.0] * WIDTH, "the embedding of item 900 is zero, or too short"),
        ([1e-6] * WIDTH, "the embedding of item 900 is zero, or too short"),
        ([1.0] * (WIDTH + 1), f"has {WIDTH + 1} dimensions, those of the tokenizer bundle have"),
        ([], "has 0 dimensions"),
        (None, "cannot embed it by itself"),
    ],
)
def test_an_embedding_that_says_nothing_is_refused(
    embedded: Bundle, vector: list[float] | None, message: str
) -> None:
    with pytest.raises(UnprocessableError, match=message) as caught:
        store_of(embedded).with_sids(delta(add=[{"item_id": 900, "embedding": vector}]))
    assert "/" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39, True, "1.0", None])
def test_an_embedding_of_something_else_than_numbers_is_malformed(value: Any) -> None:
    with pytest.raises(ValidationError):
        delta(add=[{"item_id": 900, "embedding": [1.0, value]}])
    with pytest.raises(ValidationError, match="but not both"):
        delta(add=[{"item_id": 900, "embedding": [1.0], "sid": [0, 0]}])


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_numbers_of_half_precision_are_numbers(embedded: Bundle, kind: torch.dtype) -> None:
    half = torch.from_numpy(VECTOR[2]).to(kind).float().numpy()
    assert (half != VECTOR[2]).any()
    (item,) = changed(store_of(embedded), add=[new(900, half)])
    point = half - embedded.projection.mean
    assert item.sid[0] == ((point - embedded.books[0]) ** 2).sum(axis=1).argmin()


@pytest.mark.slow
def test_a_full_level_is_refused_or_shared(tmp_path: Path) -> None:
    bundle = write_shop(tmp_path / "shop", embedded=True, levels=(3, 40))
    store, count = store_of(bundle), 0
    prefix = changed(store, add=[new(900, VECTOR[0])])[0].sid[0]
    while sum(sid[0] == prefix for sid in sids(store).values()) < 40:
        count += 1
        changed(store, add=[new(900 + count, VECTOR[0])])
    with pytest.raises(UnprocessableError, match="send share_when_full") as caught:
        changed(store, add=[new(997, VECTOR[0])])
    assert 5 < count < 40
    assert f"below ({prefix}), where item 997 belongs (1 of 1 items find none)" in str(caught.value)
    full = sids(store)
    assert {sid[1] for sid in full.values() if sid[0] == prefix} == set(range(40))
    (item,) = changed(store, add=[new(999, VECTOR[0])], share_when_full=True)
    assert item.shared
    assert tuple(item.sid) in full.values()
    resolved, _ = store.with_sids(delta(add=[new(998, VECTOR[0])], share_when_full=True))
    assert "share_when_full" not in resolved.model_dump(exclude_defaults=True)


def test_codes_without_a_token_are_not_assigned(embedded: Bundle) -> None:
    few = embedded.table.take((embedded.table.sid < (3, 20)).all(axis=1))
    catalog = from_codes(few.sid, item_id=few.item_id, level_size=(3, 20))
    store = store_of(embedded, catalog)
    made = changed(store, add=[new(900 + row, vector) for row, vector in enumerate(VECTOR[:8])])
    assert all(item.sid[1] < 20 for item in made)


@pytest.mark.slow
def test_a_bundle_whose_collisions_have_a_level_gives_the_lowest_free_number(
    tmp_path: Path,
) -> None:
    bundle = write_shop(tmp_path / "shop", collisions="extra_level", levels=(3, 10), seed=4)
    size = bundle.description.level_size[-1]
    assert size > 1
    title, store = "red oak lamp", store_of(bundle)
    probe, _ = store.with_sids(delta(add=[{"item_id": 900, "title": title}]))
    prefix = tuple(probe.add[0].sid or ())[:2]
    free = set(range(size)) - {sid[2] for sid in sids(store).values() if sid[:2] == prefix}
    for count, rank in enumerate(sorted(free)):
        (item,) = changed(store, add=[{"item_id": 900 + count, "title": title}])
        assert (tuple(item.sid), item.moved) == ((*prefix, rank), False)
    with pytest.raises(UnprocessableError, match=f"all {size} codes of the last level"):
        changed(store, add=[{"item_id": 999, "title": title}])


def test_without_a_bundle_items_need_their_ids(embedded: Bundle) -> None:
    catalog = store_of(embedded).current.catalog
    store = store_of(None, catalog)
    with pytest.raises(UnprocessableError, match="carries no tokenizer bundle; send its sid"):
        store.with_sids(delta(add=[new(900, VECTOR[0])]))
    why = "the tokenizer bundle is not used: it is damaged"
    with pytest.raises(UnprocessableError, match=why):
        store_of(None, catalog, refused=why).with_sids(delta(add=[new(900, VECTOR[0])]))
    explicit = delta(add=[{"item_id": 900, "sid": [0, 0]}], remove=[8])
    assert store.with_sids(explicit) == (explicit, [])
    store.activate(store.apply(explicit))
    # An item that was removed has an ID, bundle or not.
    (back,) = changed(store, add=[{"item_id": 8, "title": "back"}])
    assert (back.source, back.typical_distance) == ("kept", None)


def test_many_new_items_come_without_neighbors(
    embedded: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.catalog.new_items._MOST_WITH_NEIGHBORS", 2)
    made = changed(store_of(embedded), add=[new(900 + row, VECTOR[row]) for row in range(3)])
    assert all(item.neighbors == [] and item.distance is not None for item in made)
