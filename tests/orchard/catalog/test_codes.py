"""Code columns that would make dead tokens are refused, unless sizes are stated."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchard.catalog import catalog as catalogs
from orchard.errors import CatalogError


def items(folder: Path, codes: np.ndarray, kind: pa.DataType | None = None) -> Path:
    sids = pa.array(codes.tolist(), kind or pa.list_(pa.int64()))
    pq.write_table(
        pa.table({"item_id": np.arange(len(codes)), "sid": sids}), folder / "items.parquet"
    )
    return folder / "items.parquet"


def drawn(levels: int = 3, size: int = 64, rows: int = 60) -> np.ndarray:
    return np.random.default_rng(0).integers(0, size, (rows, levels))


@pytest.mark.parametrize("offset", [64, 256, 8192])
@pytest.mark.parametrize("last", [0, 1])
def test_offsets_per_level_are_refused(tmp_path: Path, offset: int, last: int) -> None:
    codes = drawn() + offset * np.arange(3)
    codes = np.concatenate([codes, np.arange(60)[:, None]], axis=1) if last else codes
    with pytest.raises(CatalogError, match=r"codes of level 2 run from .* offset per level"):
        catalogs.read(items(tmp_path, codes))
    sizes = (codes.max(0) + 1).tolist()
    stated = catalogs.read(items(tmp_path, codes), level_size=sizes)
    assert list(stated.level_size) == sizes


@pytest.mark.parametrize("code", [100_000, 10_000_000])
@pytest.mark.parametrize("level", [0, 2])
def test_codes_far_apart_are_refused(tmp_path: Path, code: int, level: int) -> None:
    codes = drawn()
    codes[7, level] = code
    with pytest.raises(
        CatalogError, match=rf"level {level + 1} has .* different codes up to {code}"
    ):
        catalogs.read(items(tmp_path, codes))


@pytest.mark.slow
def test_codes_that_count_from_zero_or_one_are_read(tmp_path: Path) -> None:
    for shift in (0, 1):
        codes = drawn() + shift
        assert (catalogs.read(items(tmp_path, codes)).codes == codes).all()
    wide = np.arange(100_000).reshape(-1, 1)  # one level with a code per item
    assert len(catalogs.read(items(tmp_path, wide))) == 100_000


def test_lists_of_a_fixed_size_are_read(tmp_path: Path) -> None:
    codes = drawn()
    fixed = catalogs.read(items(tmp_path, codes, pa.list_(pa.int32(), 3)))
    assert (fixed.codes == codes).all()
