"""The ledger of catalog deltas: what is missing, damaged or foreign is named, never passed over."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from orchard.errors import ConfigError, DataError
from orchard.testing import TinySetup, tiny_setup
from serve.catalog.attributes import NOTHING
from serve.catalog.ledger import HEAD, LedgerError
from serve.catalog.schema import DeltaRequest
from serve.catalog.store import CatalogStore
from serve.errors import ConflictError
from serve.shared_state import SharedState
from serve.testing import make_catalog_store

DELTAS: list[dict[str, object]] = [
    {"remove": [1, 2]},
    {"update": [{"item_id": 5, "attributes": {"price": 3}}]},
    {"remove": [7]},
    {"add": [{"item_id": 100, "sid": [0, 0, 0], "attributes": {"stock": True}}]},
]


def written(world: TinySetup, folder: Path, deltas: list[dict[str, object]] = DELTAS) -> Path:
    """Write a ledger as an endpoint does; return the folder of its files."""
    store, state = make_catalog_store(world), SharedState(folder, world.catalog.digest)
    for changes in deltas:
        delta = DeltaRequest.model_validate(changes)
        made = store.apply(delta)
        state.append(made, delta)
        store.activate(made)
    return folder / world.catalog.digest[:16] / "deltas"


def read(world: TinySetup, folder: Path, keep: int = 3) -> CatalogStore:
    """Start a replica from a ledger."""
    store = make_catalog_store(world, keep=keep)
    SharedState(folder, world.catalog.digest).catch_up(store)
    return store


def live(store: CatalogStore) -> set[int]:
    snapshot = store.current.snapshot
    return set(snapshot.catalog.item_id[snapshot.live].tolist())


def test_a_replica_that_starts_later_reads_every_delta(
    shop_world: TinySetup, tmp_path: Path
) -> None:
    deltas = written(shop_world, tmp_path)
    store = read(shop_world, tmp_path)
    assert store.current.version == 4
    assert live(store) == (set(range(40)) - {1, 2, 7}) | {100}
    assert SharedState(tmp_path, shop_world.catalog.digest).verify() == 4
    entries = [json.loads((deltas / f"{n:09d}.json").read_text()) for n in range(1, 5)]
    assert entries[0]["previous"] == shop_world.catalog.digest
    for before, after in pairwise(entries):
        assert after["previous"] == before["digest"]
    assert entries[3]["makes"] == store.current.digest


def spoil(name: str, text: str | None) -> Callable[[Path], None]:
    """Return a function that replaces a file of the ledger, or removes it."""

    def change(deltas: Path) -> None:
        (deltas / name).unlink() if text is None else (deltas / name).write_text(text)

    return change


def cut(deltas: Path) -> None:
    path = deltas / "000000002.json"
    path.write_text(path.read_text()[:40])


def edited(deltas: Path) -> None:
    path = deltas / "000000003.json"
    path.write_text(path.read_text().replace('"remove": [7]', '"remove": [8]'))


def swapped(deltas: Path) -> None:
    shutil.copy(deltas / "000000003.json", deltas / "000000002.json")


@pytest.mark.parametrize(
    ("change", "number", "why"),
    [
        (spoil("000000002.json", None), 2, "is missing, the newest is delta 4"),
        (spoil("000000004.json", None), 4, "is missing, the newest is delta 4"),
        (spoil("000000003.json", ""), 3, "is empty"),
        (spoil("000000003.json", "\n"), 3, "is empty"),
        (spoil("000000003.json", "[1]"), 3, "is not a delta"),
        (spoil("000000003.json", '{"remove": [7]}'), 3, "does not have the digest"),
        (spoil("000000001.json", '{"digest": "0", "delta": {}}'), 1, "does not have the digest"),
        (cut, 2, "is cut short or damaged"),
        (edited, 3, "does not have the digest that it names"),
        (swapped, 2, "does not continue this ledger"),
    ],
)
def test_a_damaged_ledger_names_the_file_and_what_to_do(
    shop_world: TinySetup,
    tmp_path: Path,
    change: Callable[[Path], None],
    number: int,
    why: str,
) -> None:
    deltas = written(shop_world, tmp_path)
    change(deltas)
    with pytest.raises(LedgerError, match=why) as failure:
        read(shop_world, tmp_path)
    assert f"{number:09d}.json" in str(failure.value)
    assert f"to continue from catalog version {number - 1}" in str(failure.value)
    with pytest.raises(LedgerError, match=why):
        SharedState(tmp_path, shop_world.catalog.digest).verify()
    # The remedy: move it, all later deltas and the head away.
    aside = tmp_path / "aside"
    aside.mkdir()
    for path in deltas.glob("*.json"):
        if path.name == HEAD or int(path.stem) >= number:
            path.rename(aside / path.name)
    store = read(shop_world, tmp_path)
    assert store.current.version == number - 1


def test_the_ledger_of_another_catalog_is_foreign(shop_world: TinySetup, tmp_path: Path) -> None:
    other = written(tiny_setup(num_items=30), tmp_path / "other", [{"remove": [3]}])
    deltas = written(shop_world, tmp_path, [])
    shutil.copy(other / "000000001.json", deltas)
    with pytest.raises(LedgerError, match="does not continue this ledger"):
        read(shop_world, tmp_path)


def test_a_damaged_head_is_named(shop_world: TinySetup, tmp_path: Path) -> None:
    deltas = written(shop_world, tmp_path)
    (deltas / HEAD).write_text("")
    with pytest.raises(LedgerError, match=r"head\.json is damaged; restore it"):
        read(shop_world, tmp_path)
    (deltas / HEAD).unlink()
    assert read(shop_world, tmp_path).current.version == 4


def test_fewer_kept_versions_do_not_hinder_a_rollback_that_happened(
    shop_world: TinySetup, tmp_path: Path
) -> None:
    deltas: list[dict[str, object]] = [
        {"remove": [1]}, {"remove": [2]}, {"rollback_to": 1}, {"remove": [3]}, {"rollback_to": 2},
        {"remove": [4]},
    ]  # fmt: skip
    written(shop_world, tmp_path, deltas)
    for keep in (1, 3):
        assert live(read(shop_world, tmp_path, keep=keep)) == set(range(40)) - {1, 2, 4}


def test_attributes_that_are_no_longer_configured_are_passed_over(
    shop_world: TinySetup, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written(shop_world, tmp_path)
    store = CatalogStore(
        shop_world.tokenizer, attributes=NOTHING, filters={}, popularity={}, keep=1
    )
    SharedState(tmp_path, shop_world.catalog.digest).catch_up(store)
    assert store.current.version == 4
    assert "fit no column of serve.attributes and are ignored: price" in caplog.text


def test_files_of_an_earlier_release_are_read_before_those_with_digests(
    shop_world: TinySetup, tmp_path: Path
) -> None:
    deltas = written(shop_world, tmp_path, [])
    (deltas / "000000001.json").write_text('{"remove": [1], "add": [], "dry_run": false}')
    store, state = make_catalog_store(shop_world), SharedState(tmp_path, shop_world.catalog.digest)
    state.catch_up(store)
    delta = DeltaRequest.model_validate({"remove": [2]})
    state.append(store.apply(delta), delta)
    assert live(read(shop_world, tmp_path)) == set(range(40)) - {1, 2}
    (deltas / "000000001.json").write_text('{"remove": [9]}')
    with pytest.raises(LedgerError, match=r"000000002\.json does not continue"):
        read(shop_world, tmp_path)


def test_of_two_replicas_one_makes_a_version(shop_world: TinySetup, tmp_path: Path) -> None:
    delta = DeltaRequest.model_validate({"remove": [1]})
    one, other = (SharedState(tmp_path, shop_world.catalog.digest) for _ in range(2))
    made = make_catalog_store(shop_world).apply(delta)
    one.append(made, delta)
    with pytest.raises(ConflictError, match="created version 1 at the same time"):
        other.append(made, delta)


def test_the_digest_of_a_version_tells_what_was_removed(shop_world: TinySetup) -> None:
    store = make_catalog_store(shop_world)
    first = store.current
    digests = {
        store.apply(DeltaRequest.model_validate({"remove": removed})).digest
        for removed in ([1], [2], [1, 2])
    }
    assert first.digest == shop_world.catalog.digest
    assert len(digests | {first.digest}) == 4
    back = replace(first, version=5)
    assert back.digest == first.digest


def test_a_damaged_pin_and_a_state_that_cannot_be_written_are_named(
    shop_world: TinySetup, tmp_path: Path
) -> None:
    state = SharedState(tmp_path, shop_world.catalog.digest)
    state.pin("main", "3-abc")
    assert state.pinned("main") == "3-abc"
    (tmp_path / shop_world.catalog.digest[:16] / "pin-main.json").write_text("")
    with pytest.raises(DataError, match=r"pin-main\.json is damaged; remove it"):
        state.pinned("main")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written .*; set serve\.state"):
        SharedState(tmp_path / "file", shop_world.catalog.digest)
