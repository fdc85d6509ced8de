"""Exposure log: shown items with user, policy and log-probabilities, for off-policy evaluation.

The log has one row per shown item, in Parquet files that are written atomically to one folder.
Rewards are joined later by `request_id` and `item_id` (see `orchard.evaluation.off_policy`).
"""

import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from orchard.folders import atomic_file
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
"""Number of files whose rows stay in memory if they cannot be written; older rows are dropped."""


class ExposureLog:
    """Buffer of rows written to Parquet files. Thread-safe; one thread writes at a time."""

    def __init__(self, folder: Path, *, rows: int = 5000) -> None:
        """Create the folder of a log whose buffer holds `rows` rows."""
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
        """Buffer an answer with its levels; return whether the buffer should be flushed.

        Args:
            answer: answer with its items and levels.
            request_id: ID of the request.
            user: user of the request, if it has one.
            history: item ids in the prompt of the policy.
            temperature: sampling temperature.
            restricted: whether items were excluded or filtered, so that fewer could be drawn, or
                the request gave context, which is not logged.
            shadow: whether the answer was only logged and not shown.
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
        """Write the buffered rows to a new file; keep them in the buffer if that fails."""
        with self._writing:
            with self._lock:
                rows, self._rows = self._rows, []
            if not rows:
                return
            name = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:12]}"
            try:
                with atomic_file(self._folder / f"{name}.parquet") as partial:
                    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), partial, compression="zstd")
            except OSError:
                with self._lock:  # retried by the next flush, up to the memory limit
                    self._rows = (rows + self._rows)[-_KEPT_FILES * self._size :]
                raise
