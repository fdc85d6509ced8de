"""Items are read with the bundle that gave them their semantic IDs."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchard.catalog import catalog as catalogs
from orchard.data.items import read_items
from orchard.errors import CatalogError, DataError
from orchard.semantic_ids import bundle
from orchard.semantic_ids.item_table import digest_of
from orchard.settings import DataConfig
from orchard.testing import tiny_catalog
from tests.fixtures.bundles import bundle_of, write_shop


def test_levels_have_room_for_every_code_of_the_bundle(tmp_path: Path) -> None:
    codes = tiny_catalog(level_size=(5, 4, 20)).codes
    items = catalogs.from_codes(codes, level_size=(5, 4, 30))
    catalogs.write(items, tmp_path)
    made = bundle_of(items, tmp_path / "sids")
    catalog, found = read_items(DataConfig(path=tmp_path), None)
    assert found is not None
    assert found.digest == made.digest
    assert catalog.level_size == (5, 4, 30)
    stated, _ = read_items(DataConfig(path=tmp_path, level_size=(5, 4, 50)), None)
    assert stated.level_size == (5, 4, 50)
    without, none = read_items(DataConfig(path=tmp_path, bundle=""), None)
    assert none is None
    assert without.level_size[2] < 30


@pytest.mark.slow
def test_a_bundle_with_later_items_is_that_of_the_catalog(tmp_path: Path) -> None:
    made = write_shop(tmp_path / "shop")
    added = made.table.take(np.array([0, 1]))
    object.__setattr__(added, "item_id", np.array([900, 901]))
    bundle.append(made, added, {})
    _, found = read_items(DataConfig(path=tmp_path / "shop"), None)
    assert found is not None
    assert (found.version, len(found.table)) == (2, 62)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["other codes", "other depth", "unknown item"])
def test_a_bundle_of_another_catalog_is_refused_with_both_digests(
    tmp_path: Path, kind: str
) -> None:
    made = write_shop(tmp_path / "shop")
    path = tmp_path / "shop" / "items.parquet"
    table = pq.read_table(path)
    sids, ids = table["sid"].to_pylist(), table["item_id"].to_pylist()
    if kind == "other codes":
        sids[4] = [sids[4][0], (sids[4][1] + 1) % 40]
    elif kind == "other depth":
        sids = [[*sid, 0] for sid in sids]
    else:
        ids[4] = 999
    pq.write_table(pa.table({"item_id": ids, "sid": sids}), path)
    with pytest.raises(CatalogError, match="or set data.bundle") as caught:
        read_items(DataConfig(path=tmp_path / "shop"), None)
    message = str(caught.value)
    assert made.table.digest[:12] in message
    catalog, _ = read_items(DataConfig(path=tmp_path / "shop", bundle=""), None)
    own = digest_of(catalog.item_id, catalog.plain_codes)
    assert f"the catalog the items {own[:12]}" in message
    assert f"({60 if kind == 'other depth' else 1} of 60 items differ)" in message
    assert caught.value.code == "catalog.other_bundle"


@pytest.mark.slow
def test_a_bundle_that_is_named_has_to_be_there(tmp_path: Path) -> None:
    write_shop(tmp_path / "shop")
    shutil.move(tmp_path / "shop" / "sids", tmp_path / "elsewhere")
    assert read_items(DataConfig(path=tmp_path / "shop"), None)[1] is None
    named = DataConfig(path=tmp_path / "shop", bundle=str(tmp_path / "elsewhere"))
    assert read_items(named, None)[1] is not None
    with pytest.raises(DataError, match="holds no tokenizer bundle"):
        read_items(DataConfig(path=tmp_path / "shop", bundle="missing"), None)
