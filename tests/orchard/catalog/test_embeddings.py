"""Embeddings of every usual file are matched by item, and implausible ones refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from orchard.catalog import embeddings
from orchard.errors import DataError

IDS = np.array([7, 3, 9, 5])
ORDER = np.array([2, 0, 3, 1])
VECTORS = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)


def save(path: Path, how: str) -> Path:
    ids, vectors = IDS[ORDER], VECTORS[ORDER]
    match how:
        case "parquet":
            pq.write_table(pa.table({"item_id": ids, "embedding": list(vectors)}), path)
        case "fixed":
            flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), 6)
            pq.write_table(pa.table({"item_id": ids, "embedding": flat}), path)
        case "npz":
            with path.open("wb") as file:
                np.savez(file, item_id=ids, embedding=vectors)
        case "dictionary":
            torch.save(
                {"item_id": torch.from_numpy(ids), "embedding": torch.from_numpy(vectors)}, path
            )
        case "by item":
            torch.save(
                {int(i): torch.from_numpy(v) for i, v in zip(ids, vectors, strict=True)}, path
            )
        case "tensor":
            torch.save(torch.from_numpy(VECTORS), path)
        case "half":
            torch.save(torch.nn.Parameter(torch.from_numpy(VECTORS).bfloat16()), path)
        case "rows":
            with path.open("wb") as file:
                np.savez(file, VECTORS)
        case _:
            np.save(path, VECTORS)
    return path


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("e.parquet", "parquet"), ("e.parquet", "fixed"), ("e.npz", "npz"), ("e.pt", "dictionary"),
        ("e.pt", "by item"), ("e.pt", "tensor"), ("e.pth", "half"), ("e.npz", "rows"),
        ("e.npy", "npy"),
    ],
)  # fmt: skip
def test_every_kind_of_file_gives_each_item_its_row(tmp_path: Path, name: str, how: str) -> None:
    found = embeddings.read(save(tmp_path / name, how), IDS, remedy="")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, VECTORS, rtol=1e-2 if how == "half" else 0)


class Foreign:
    """A class that only its own program knows."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Foreign(), "holds no plain tensors"),
        ({"a": torch.ones(4, 2), "b": torch.ones(4, 2)}, "name the array of embeddings"),
        ({"item_id": torch.ones(4), "embedding": torch.ones(4, 2)}, "save integers"),
        ({"item_id": torch.arange(3), "embedding": torch.ones(4, 2)}, "give one to each"),
        ({1: torch.ones(2), 2: torch.ones(3)}, "differ in length"),
        ([1, 2], "holds a list"),
        (torch.full((4, 2), 1e30), "beyond 1e\\+12, whose squares overflow"),
        (torch.full((4, 2), -1e13), "beyond 1e\\+12"),
        (torch.full((4, 2), 1e300, dtype=torch.float64), "not finite|beyond"),
        (torch.zeros(4, 0), "no dimensions"),
    ],
)
def test_what_holds_no_embeddings_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "e.pt")
    with pytest.raises(DataError, match=message):
        embeddings.read(tmp_path / "e.pt", IDS, remedy="")
