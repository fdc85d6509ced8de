"""Read MiniOneRec's folder layout: CSV splits, `*.index.json`, `*.item.json` and `info/*.txt`.

Semantic IDs come from the index file and titles from the item file; without an index file both
come from the info file. Histories and targets are the item ids of the CSV files, since several
items may share a semantic ID (https://github.com/AkaliKong/MiniOneRec).
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
from jaxtyping import Int64

from orchard import ragged
from orchard.data.importers.examples import PARTS, SplitExamples
from orchard.data.importers.flat import Tick
from orchard.data.importers.log import ItemTable
from orchard.errors import DataError

_COLUMNS = ("user_id", "history_item_id", "item_id")
_NUMBERS = re.compile(r"-?\d+")
_CODE = re.compile(r"<([a-z])_(\d+)>")


def read_folder(folder: Path, tick: Tick) -> SplitExamples:
    """Read the examples of the folder with the split that it has.

    Raises:
        DataError: a file is missing or ambiguous, or a row or an item cannot be read.
    """
    items = _items(folder)
    order = np.argsort(items.item_id)
    tables = [_read_part(_only(folder, f"**/{part}/*.csv", part), tick) for part in PARTS]
    history: list[Int64[np.ndarray, " _"]] = []
    count: list[Int64[np.ndarray, " _"]] = []
    for part, table in zip(PARTS, tables, strict=True):
        lists = [_NUMBERS.findall(text or "") for text in table["history_item_id"].to_pylist()]
        count.append(np.array([len(item_ids) for item_ids in lists], dtype=np.int64))
        if len(lists) == 0 or count[-1].min() == 0:
            row = int(np.argmin(count[-1])) + 2 if lists else 1
            raise DataError(
                f"row {row} of the {part} file has no history; drop rows without an earlier item"
            )
        history.append(np.array([int(i) for item_ids in lists for i in item_ids], dtype=np.int64))
    target = np.concatenate([t["item_id"].cast(pa.int64()).to_numpy() for t in tables])
    length = np.concatenate(count)
    users = pa.concat_arrays([t["user_id"].combine_chunks() for t in tables]).dictionary_encode()
    return SplitExamples(
        items=items,
        sequence=_rows(np.concatenate(history), items, order),
        first=ragged.starts(length)[:-1],
        length=length,
        target=_rows(target, items, order),
        user_id=users.indices.to_numpy().astype(np.int64),
        timestamp=None,
        part=np.repeat(np.arange(len(PARTS)), [len(table) for table in tables]),
        # Histories of the maximum length may have been truncated.
        whole=length < length.max(),
        split="given",
        facts={"num_users": len(users.dictionary), "num_items": len(items)},
    )


def _items(folder: Path) -> ItemTable:
    """Read the items from index and item file or, without an index file, from the info file."""
    sid_and_title: dict[int, tuple[str, str]] = {}
    if list(folder.glob("**/*.index.json")):
        index = _json(_only(folder, "**/*.index.json", "index"))
        item_files = list(folder.glob("**/*.item.json"))
        metadata = _json(_only(folder, "**/*.item.json", "item")) if item_files else {}
        for key, code_tokens in index.items():
            title = metadata.get(key, {}).get("title") or ""
            sid_and_title[int(key)] = ("".join(code_tokens), " ".join(str(title).split()))
    else:
        path = _only(folder, "**/info/*.txt", "info")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            fields = line.split("\t")
            if len(fields) != 3 or not fields[2].strip().isdigit():
                raise DataError(
                    f"line {number} of {path} is not `semantic ID, tab, title, tab, item id`; "
                    "correct it"
                )
            if int(fields[2]) in sid_and_title:
                raise DataError(f"line {number} of {path} lists item {fields[2]} again; remove it")
            sid_and_title[int(fields[2])] = (fields[0], fields[1])
    ids = sorted(sid_and_title)
    return ItemTable(
        item_id=np.array(ids, dtype=np.int64),
        title=tuple(sid_and_title[i][1] for i in ids),
        sid=tuple(_codes(sid_and_title[i][0], i) for i in ids),
    )


def _codes(text: str, item: int) -> tuple[int, ...]:
    """Parse a semantic ID such as `<a_1><b_2><c_3>`."""
    codes = _CODE.findall(text)
    levels = [level for level, _ in codes]
    if not codes or levels != [chr(ord("a") + i) for i in range(len(codes))]:
        raise DataError(
            f"item {item} has the semantic ID {text!r}; it must read like <a_1><b_2><c_3>"
        )
    return tuple(int(code) for _, code in codes)


def _only(folder: Path, pattern: str, role: str) -> Path:
    """Return the one file of the folder that matches the pattern."""
    matches = sorted(folder.glob(pattern))
    if len(matches) != 1:
        names = ", ".join(str(path.relative_to(folder)) for path in matches) or "none"
        raise DataError(
            f"{folder} must hold one {role} file ({pattern.removeprefix('**/')}), not {names}; "
            "leave one data set in the folder"
        )
    return matches[0]


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error


def _read_part(path: Path, tick: Tick) -> Any:
    try:
        table = csv.read_csv(
            path,
            parse_options=csv.ParseOptions(newlines_in_values=True),
            convert_options=csv.ConvertOptions(
                include_columns=list(_COLUMNS),
                column_types={
                    "user_id": pa.string(), "history_item_id": pa.string(), "item_id": pa.int64(),
                },
            ),
        )  # fmt: skip
    except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
        raise DataError(
            f"{path} cannot be read: {error}; its columns must include {', '.join(_COLUMNS)}"
        ) from error
    tick(path.stat().st_size)
    return table


def _rows(
    item_id: Int64[np.ndarray, " N"], items: ItemTable, order: Int64[np.ndarray, " I"]
) -> Int64[np.ndarray, " N"]:
    """Return the row of each item in `items`, whose rows `order` sorts by `item_id`."""
    position = np.searchsorted(items.item_id, item_id, sorter=order).clip(max=len(items) - 1)
    rows = order[position]
    unknown = np.flatnonzero(items.item_id[rows] != item_id)
    if len(unknown):
        raise DataError(
            f"item {item_id[unknown[0]]} of a split has no semantic ID ({len(unknown)} such "
            "references); add it to the index file"
        )
    return rows
