"""A catalog that changes, against one that is made anew after every change."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchard.catalog.catalog import Catalog, from_codes
from orchard.catalog.versioned import Compaction, Snapshot, VersionedCatalog
from orchard.errors import CatalogError, DataError

# An end marker at levels 2 and 3 from the start.
BASE = [[0], [0, 0], [0, 0, 0], [1, 2, 0], [1, 2, 0], [2, 1]]
codes = st.lists(st.integers(0, 2), min_size=1, max_size=3)
changes = st.lists(
    st.one_of(
        st.tuples(st.just("add"), codes),
        st.tuples(st.just("remove"), st.integers(0, 20)),
        st.tuples(st.sampled_from(["prepare", "swap"]), st.none()),
    ),
    max_size=14,
)


def made_anew(rows: dict[int, list[int]]) -> Catalog:
    return from_codes(
        list(rows.values()),
        item_id=np.array(list(rows)),
        level_size=(3, 3, 3),
        varying_depth=True,
    )


def waiting(catalog: VersionedCatalog) -> int:
    """Number of items that a search does not find yet."""
    return len(catalog._delta)  # pyright: ignore[reportPrivateUsage]


@dataclass
class Model:
    """The same by plain dictionaries: what is found now, what waits, what a swap will bring."""

    live: VersionedCatalog = field(
        default_factory=lambda: VersionedCatalog(
            from_codes(BASE, level_size=(3, 3, 3), varying_depth=True)
        )
    )
    found: dict[int, list[int]] = field(default_factory=lambda: dict(enumerate(BASE)))
    waiting: dict[int, list[int]] = field(default_factory=dict)
    prepared: tuple[Compaction, dict[int, list[int]]] | None = None
    fresh: int = 100

    def add(self, sid: list[int]) -> None:
        self.live.add([sid], [self.fresh])
        self.waiting[self.fresh] = sid
        self.fresh += 1

    def remove(self, which: int) -> None:
        there = sorted(self.found | self.waiting)
        if len(there) > 1:
            item = there[which % len(there)]
            self.live.remove([item])
            (self.found if item in self.found else self.waiting).pop(item)

    def prepare(self, _: None) -> None:
        rows = self.found | self.waiting
        compaction = self.live.compact()
        assert compaction.merged.digest == made_anew(rows).digest
        assert torch.equal(compaction.merged.trie.code, made_anew(rows).trie.code)
        self.prepared = compaction, rows

    def swap(self, _: None) -> None:
        if self.prepared is not None:
            compaction, rows = self.prepared
            self.live.commit(compaction)
            there = self.found | self.waiting
            self.found = {item: sid for item, sid in rows.items() if item in there}
            self.waiting = {i: sid for i, sid in self.waiting.items() if i not in rows}
            self.prepared = None


def offered(snapshot: Snapshot) -> dict[int, list[int]]:
    """Every item that a search of the snapshot can lead to."""
    trie = snapshot.catalog.trie
    leaf = torch.arange(trie.num_leaves)[snapshot.view.live[trie.leaf_node]]
    row, start = snapshot.items(leaf.numpy())
    assert (np.diff(start) > 0).all()  # no live leaf without an item
    plain = snapshot.catalog.plain_codes[row].tolist()
    ids = snapshot.catalog.item_id[row].tolist()
    return {i: [c for c in sid if c >= 0] for i, sid in zip(ids, plain, strict=True)}


@pytest.mark.slow
@settings(max_examples=100)
@given(changes)
def test_after_any_changes_it_offers_what_a_catalog_made_anew_does(
    given_changes: list[tuple[str, object]],
) -> None:
    model, before = Model(), -1
    first = model.live.snapshot
    for change, argument in given_changes:
        getattr(model, change)(argument)
        snapshot = model.live.snapshot
        assert offered(snapshot) == model.found
        assert waiting(model.live) == len(model.waiting)
        assert snapshot.version >= before
        before = snapshot.version
    assert offered(first) == dict(enumerate(BASE))  # a pinned snapshot sees nothing of it


def test_removed_items_leave_their_leaf_to_the_others() -> None:
    live = VersionedCatalog(from_codes(BASE, varying_depth=True))
    leaf = live.snapshot.catalog.leaf_of_item[[3]]
    live.remove([3])
    row, start = live.snapshot.items(leaf)
    assert row.tolist() == [4]
    assert start.tolist() == [0, 1]
    live.remove([4])
    assert live.snapshot.view.num_leaves == live.snapshot.catalog.trie.num_leaves - 1
    assert live.snapshot.version == 2


def test_an_identifier_may_return_with_other_codes() -> None:
    live = VersionedCatalog(from_codes(BASE, varying_depth=True))
    compaction = live.compact()
    live.remove([5])
    live.add([[2, 2]], [5], ["again"])
    live.commit(compaction)
    assert 5 not in offered(live.snapshot)
    live.commit(live.compact())
    assert offered(live.snapshot)[5] == [2, 2]
    assert live.snapshot.catalog.title[-1] == "again"
    assert waiting(live) == 0


def test_identifiers_in_use_are_refused() -> None:
    live = VersionedCatalog(from_codes(BASE, varying_depth=True))
    live.add([[2]], [7])
    for taken in ([5], [7], [8, 8]):
        with pytest.raises(CatalogError, match="1 of . items to add carry an identifier"):
            live.add([[1]] * len(taken), taken)
    assert waiting(live) == 1


def test_items_that_are_not_there_cannot_be_removed_nor_any_beside_them() -> None:
    live = VersionedCatalog(from_codes(BASE, varying_depth=True))
    live.add([[2]], [7])
    live.remove([0])
    for missing in (0, 99):
        with pytest.raises(DataError, match=f"item {missing} is not in the catalog of 5 live"):
            live.remove([1, 7, missing])
    assert sorted(offered(live.snapshot)) == [1, 2, 3, 4, 5]
    assert waiting(live) == 1


def test_codes_that_no_policy_knows_are_refused() -> None:
    live = VersionedCatalog(from_codes([[0, 1], [1, 0]]))
    with pytest.raises(CatalogError, match="code 2 at level 1; codes there run from 0 to 1"):
        live.add([[2, 0]], [7])
    with pytest.raises(CatalogError, match="depth 1 where 2 was expected"):
        live.add([[1]], [7])
    uneven = VersionedCatalog(from_codes([[0, 1], [1]], varying_depth=True))
    uneven.add([[0]], [7])
    with pytest.raises(CatalogError, match="need an end marker at level 2, of which .* 2 codes"):
        uneven.compact()
    uneven.remove([7])
    assert uneven.compact().merged.digest == uneven.snapshot.catalog.digest


def test_a_catalog_of_tombstones_offers_nothing_and_cannot_be_compacted() -> None:
    live = VersionedCatalog(from_codes([[0], [1]]))
    live.remove([0, 1])
    assert offered(live.snapshot) == {}
    with pytest.raises(CatalogError, match="no items"):
        live.compact()


def test_of_two_compactions_of_one_catalog_the_second_is_refused() -> None:
    live = VersionedCatalog(from_codes([[0], [1], [2]]))
    one, other = live.compact(), live.compact()
    live.commit(one)
    with pytest.raises(CatalogError, match="has replaced; compact again"):
        live.commit(other)


def test_titles_change_as_semantic_ids_do() -> None:
    tokens = (11, 12, 13, 2)  # of the codes 0, 1, 2 and of the end
    first = from_codes([[0, 1], [2]], varying_depth=True, code_token=tokens)
    live = VersionedCatalog(first)
    with pytest.raises(CatalogError, match="depth 4 where 3 was"):
        live.add([[0, 1, 2]], [7])
    live.add([[0]], [7])
    live.remove([1])
    live.commit(live.compact())
    expected = from_codes(
        [[0, 1], [0]], item_id=np.array([0, 7]), varying_depth=True, code_token=tokens
    )
    assert live.snapshot.catalog.digest == expected.digest
    assert offered(live.snapshot) == {0: [0, 1], 7: [0]}


def test_a_fork_and_its_origin_do_not_see_each_others_changes() -> None:
    origin = VersionedCatalog(from_codes(BASE, level_size=(3, 3, 3), varying_depth=True))
    origin.add([[2, 2]], [50])
    twin = origin.copy()
    twin.remove([0])
    origin.add([[2, 2, 2]], [51])
    twin.commit(twin.compact())
    assert sorted(offered(origin.snapshot)) == [0, 1, 2, 3, 4, 5]
    assert sorted(offered(twin.snapshot)) == [1, 2, 3, 4, 5, 50]
    assert (waiting(origin), waiting(twin)) == (2, 0)
