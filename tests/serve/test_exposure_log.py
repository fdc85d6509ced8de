"""The exposure log while its folder cannot be written."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from serve.exposure_log import ExposureLog
from serve.schema import Cost, Item, RecommendResponse


def answer(number: int) -> RecommendResponse:
    cost = Cost(prefill_tokens=1, forward_tokens=2, passes=3, batch=1, seconds=0.1)
    item = Item(rank=1, item_id=number, score=-1.0, sid=[1, 2], title="")
    return RecommendResponse(
        items=[item], returned=1, requested=1, source="policy", variant="main", policy="v1",
        catalog="0", decoder="beam", width=4, cost=cost,
    )  # fmt: skip


def test_rows_that_could_not_be_written_are_written_later_up_to_a_bound(tmp_path: Path) -> None:
    log, folder = ExposureLog(tmp_path / "log", rows=3), tmp_path / "log"

    def add(number: int) -> None:
        log.add(
            answer(number), request_id=str(number), user="", history=[], temperature=1.0,
            restricted=False, shadow=False,
        )  # fmt: skip

    for number in range(50):
        add(number)
    shutil.rmtree(folder)
    with pytest.raises(OSError, match="log"):
        log.flush()
    add(50)
    folder.mkdir()
    log.flush()
    (file,) = folder.glob("*.parquet")
    assert pq.read_table(file)["item_id"].to_pylist() == list(range(20, 51))
