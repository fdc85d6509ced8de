"""Write a data set in the schema of docs/data.md, atomically."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64

from orchard import folders, ragged
from orchard.data.importers.card import CARD, facts
from orchard.data.importers.examples import PARTS, SplitExamples

_ROWS = 100_000
"""Number of rows whose histories are in memory at a time."""


def write(
    out: Path, examples: SplitExamples, *, source: str, overwrite: bool
) -> Mapping[str, float]:
    """Write items, names of users, splits and card to `out`; return the card's facts.

    Raises:
        DataError: `out` is not empty and not a data set to overwrite, or the split leaks (see
            `card.facts`).
    """
    folders.check_output_dir(out, mark=CARD, kind="data set", overwrite=overwrite)
    card_facts = facts(examples)
    card = {
        "source": source,
        "split": examples.split,
        "facts": card_facts,
        "notes": list(examples.notes),
    }
    with folders.atomic_dir(out) as partial:
        write_tables(examples, partial)
        (partial / CARD).write_text(json.dumps(card, indent=2) + "\n")
    return card_facts


def write_tables(examples: SplitExamples, folder: Path) -> None:
    """Write items, names of users and splits into a folder."""
    pq.write_table(_items(examples), folder / "items.parquet", compression="zstd")
    if examples.users is not None:
        users = pa.table({"user_id": examples.users.user_id, "key": list(examples.users.key)})
        pq.write_table(users, folder / "users.parquet", compression="zstd")
    for index, part in enumerate(PARTS):
        _write_part(examples, np.flatnonzero(examples.part == index), folder, part)


def _id_type(ids: Int64[np.ndarray, " N"]) -> Any:
    """Return the narrower type of identifiers that holds them all."""
    return pa.int32() if abs(ids).max() < 2**31 else pa.int64()


def _items(examples: SplitExamples) -> Any:
    items = examples.items
    columns: dict[str, Any] = {
        "item_id": pa.array(items.item_id).cast(_id_type(items.item_id)),
        "title": list(items.title) if items.title else [""] * len(items),
    }
    if items.key is not None:
        columns["key"] = list(items.key)
    if items.sid is not None:
        largest = max(max(codes, default=0) for codes in items.sid)
        code_type = pa.int16() if largest < 2**15 else pa.int32()
        columns["sid"] = pa.array([list(codes) for codes in items.sid], pa.list_(code_type))
        columns["sid_text"] = [
            "".join(f"<{chr(97 + level)}_{code}>" for level, code in enumerate(codes))
            for codes in items.sid
        ]
    return pa.table(columns)


def _write_part(
    examples: SplitExamples, rows: Int64[np.ndarray, " R"], folder: Path, part: str
) -> None:
    item_id = examples.items.item_id
    item_type, user_type = _id_type(item_id), _id_type(examples.user_id)
    fields = [("user_id", user_type), ("history", pa.list_(item_type)), ("target", item_type)]
    if examples.timestamp is not None:
        fields.append(("timestamp", pa.int64()))
    types = {
        n: pa.string() if v.dtype == object else pa.int64() for n, v in examples.context.items()
    }
    fields += [(f"history_{name}", pa.list_(kind)) for name, kind in types.items()]
    schema = pa.schema(fields)
    with pq.ParquetWriter(folder / f"{part}.parquet", schema, compression="zstd") as writer:
        for low in range(0, len(rows), _ROWS):
            chunk = rows[low : low + _ROWS]
            item, start = examples.history(chunk)
            values = pa.array(item_id[item]).cast(item_type)
            columns: list[Any] = [
                pa.array(examples.user_id[chunk]).cast(user_type),
                pa.ListArray.from_arrays(pa.array(start.astype(np.int32)), values),
                pa.array(item_id[examples.target[chunk]]).cast(item_type),
            ]
            if examples.timestamp is not None:
                columns.append(pa.array(examples.timestamp[chunk]))
            place = ragged.ranges(examples.first[chunk], examples.length[chunk])
            columns += [
                pa.ListArray.from_arrays(
                    pa.array(start.astype(np.int32)), pa.array(examples.context[name][place], kind)
                )
                for name, kind in types.items()
            ]
            writer.write_table(pa.table(columns, schema=schema))
