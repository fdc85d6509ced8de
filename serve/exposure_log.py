"""The exposure log: what was shown to whom, by which policy, and how likely that was.

One row per shown item, in Parquet files of their own below a folder, each there whole or not at
all. Rewards are joined later by `request_id` and `item_id` (see `orchard.evaluation.off_policy`).
"""

import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from serve.schema import RecommendResponse

SCHEMA = pa.schema(
    [
        ("request_id", pa.string()), ("time", pa.float64()), ("user", pa.string()),
        ("variant", pa.string()), ("shadow", pa.bool_()), ("policy", pa.string()),
        ("catalogue", pa.string()), ("source", pa.string()), ("decoder", pa.string()),
        ("width", pa.int32()), ("temperature", pa.float64()), ("seed", pa.int64()),
        ("restricted", pa.bool_()), ("history", pa.list_(pa.int64())), ("rank", pa.int32()),
        ("item_id", pa.int64()), ("sid", pa.list_(pa.int32())), ("score", pa.float64()),
        ("logprob", pa.list_(pa.float64())),
    ]
)  # fmt: skip

_KEPT_FILES = 10
"""Worth of rows that are kept in memory while they cannot be written."""


class ExposureLog:
    """Collects rows and writes them out; any thread may add, one writes at a time."""

    def __init__(self, folder: Path, *, rows: int = 5000) -> None:
        """Write below `folder` whenever so many rows have come together."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._size = folder, rows
        self._rows: list[dict[str, object]] = []
        self._lock, self._writing = threading.Lock(), threading.Lock()

    def add(
        self,
        answer: RecommendResponse,
        *,
        request_id: str,
        user: str | None,
        history: Sequence[int],
        temperature: float,
        restricted: bool,
        shadow: bool,
    ) -> bool:
        """Note an answer with its levels; returns if it is time to `flush`.

        Args:
            answer: what was shown.
            request_id: of the request.
            user: if the request named one.
            history: item ids that the policy was asked to read.
            temperature: of the draws.
            restricted: items were excluded or filtered, so that draws were among fewer.
            shadow: the answer was shown to nobody.
        """
        shared: dict[str, object] = {
            "request_id": request_id, "time": time.time(), "user": user,
            "variant": answer.variant, "shadow": shadow, "policy": answer.policy,
            "catalogue": answer.catalog, "source": answer.source, "decoder": answer.decoder,
            "width": answer.width, "temperature": temperature, "seed": answer.seed,
            "restricted": restricted, "history": list(history),
        }  # fmt: skip
        rows = [
            shared
            | {
                "rank": item.rank, "item_id": item.item_id, "sid": item.sid, "score": item.score,
                "logprob": None if item.levels is None else [v.logprob for v in item.levels],
            }
            for item in answer.items
        ]  # fmt: skip
        with self._lock:
            self._rows += rows
            return len(self._rows) >= self._size

    def flush(self) -> None:
        """Write what has come together as a file of its own."""
        with self._writing:
            with self._lock:
                rows, self._rows = self._rows, []
            if not rows:
                return
            name = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:12]}"
            partial = self._folder / f".{name}.partial"
            try:
                pq.write_table(pa.Table.from_pylist(rows, SCHEMA), partial, compression="zstd")
                partial.rename(self._folder / f"{name}.parquet")
            except OSError:
                partial.unlink(missing_ok=True)
                with self._lock:  # for the next try, as far as memory may be spent on them
                    self._rows = (rows + self._rows)[-_KEPT_FILES * self._size :]
                raise
