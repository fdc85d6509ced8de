"""Writing a data set in the schema of docs/data.md, all of it or nothing."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64

from orchard import folders
from orchard.data.importers.card import CARD, facts
from orchard.data.importers.examples import PARTS, SplitExamples

_ROWS = 100_000
"""Rows whose histories are in memory at a time."""


def write(
    out: Path, examples: SplitExamples, *, source: str, overwrite: bool
) -> Mapping[str, float]:
    """Write items, the three splits and the card to `out`; returns the card's facts.

    Raises:
        DataError: `out` holds something else, or the split leaks (see `card.facts`).
    """
    folders.check_output_dir(out, mark=CARD, kind="data set", overwrite=overwrite)
    found = facts(examples)
    about = {"source": source, "split": examples.split, "facts": found}
    with folders.atomic_dir(out) as partial:
        pq.write_table(_items(examples), partial / "items.parquet", compression="zstd")
        for index, part in enumerate(PARTS):
            _write_part(examples, np.flatnonzero(examples.part == index), partial, part)
        (partial / CARD).write_text(json.dumps(about, indent=2) + "\n")
    return found


def _items(examples: SplitExamples) -> Any:
    items = examples.items
    columns: dict[str, Any] = {
        "item_id": items.item_id,
        "title": list(items.title) if items.title else [""] * len(items),
    }
    if items.key is not None:
        columns["key"] = list(items.key)
    if items.sid is not None:
        columns["sid"] = pa.array([list(codes) for codes in items.sid], pa.list_(pa.int32()))
        columns["sid_text"] = [
            "".join(f"<{chr(97 + level)}_{code}>" for level, code in enumerate(codes))
            for codes in items.sid
        ]
    return pa.table(columns)


def _write_part(
    examples: SplitExamples, rows: Int64[np.ndarray, " R"], folder: Path, part: str
) -> None:
    identifier = examples.items.item_id
    kind = pa.int32() if abs(identifier).max() < 2**31 else pa.int64()
    fields = [("user_id", pa.int64()), ("history", pa.list_(kind)), ("target", kind)]
    if examples.timestamp is not None:
        fields.append(("timestamp", pa.int64()))
    schema = pa.schema(fields)
    with pq.ParquetWriter(folder / f"{part}.parquet", schema, compression="zstd") as writer:
        for low in range(0, len(rows), _ROWS):
            some = rows[low : low + _ROWS]
            item, start = examples.history(some)
            values = pa.array(identifier[item]).cast(kind)
            columns: list[Any] = [
                pa.array(examples.user_id[some]),
                pa.ListArray.from_arrays(pa.array(start.astype(np.int32)), values),
                pa.array(identifier[examples.target[some]]).cast(kind),
            ]
            if examples.timestamp is not None:
                columns.append(pa.array(examples.timestamp[some]))
            writer.write_table(pa.table(columns, schema=schema))
