"""Read MiniOneRec's folder layout: CSV splits, `*.index.json`, `*.item.json` and `info/*.txt`.

Semantic IDs come from the index file and titles from the item file; without an index file both
come from the info file. Histories and targets are the item ids of the CSV files, since several
items may share a semantic ID (https://github.com/AkaliKong/MiniOneRec).
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Int64

from orchard import ragged
from orchard.data.importers.columns import encode
from orchard.data.importers.examples import PARTS, SplitExamples
from orchard.data.importers.log import ItemTable, UserNames
from orchard.data.importers.semantic_index import item_table, only, read_index, rows_of
from orchard.data.importers.tables.table import Tick, inspect, read_columns
from orchard.errors import DataError

pc: Any = pyarrow.compute  # it generates its functions at import, invisibly to type checkers

_COLUMNS = ("user_id", "history_item_id", "item_id")
_NUMBERS = re.compile(r"-?\d+")


def read_folder(folder: Path, tick: Tick) -> SplitExamples:
    """Read the examples of the folder with the split that it has.

    Raises:
        DataError: a file is missing or ambiguous, or a row or an item cannot be read.
    """
    items = _items(folder)
    tables = [_read_part(only(folder, f"**/{part}/*.csv", part), tick) for part in PARTS]
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
    user = encode([t["user_id"] for t in tables], "user", folder.name, 2)
    if (user.row < 0).any():
        raise DataError(
            f"{int((user.row < 0).sum())} rows of {folder} have no user (NaN); fill them in or "
            "drop the rows"
        )
    return SplitExamples(
        items=items,
        sequence=rows_of(np.concatenate(history), items),
        first=ragged.starts(length)[:-1],
        length=length,
        target=rows_of(target, items),
        user_id=user.row if user.number is None else user.number[user.row],
        users=(
            UserNames(user_id=np.arange(len(user.key)), key=user.key)
            if user.number is None
            else None
        ),
        timestamp=None,
        part=np.repeat(np.arange(len(PARTS)), [len(table) for table in tables]),
        # Histories of the maximum length may have been truncated.
        whole=length < length.max(),
        split="given",
        facts={"num_users": len(user.key), "num_items": len(items)},
        notes=(
            f"{folder.name}: {', '.join(_COLUMNS)} of each split, codes and titles of the index, "
            "item or info file; other columns ignored",
        ),
    )


def _items(folder: Path) -> ItemTable:
    """Read the items from index and item file or, without an index file, from the info file."""
    items = read_index(folder)
    if items is not None:
        return items
    path = only(folder, "**/info/*.txt", "info")
    sid_and_title: dict[int, tuple[str, str]] = {}
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
    return item_table(sid_and_title)


def _read_part(path: Path, tick: Tick) -> Any:
    """Read the columns of a split; the items of histories stay text."""
    table = inspect(path)
    for name in _COLUMNS:
        if name not in table.names:
            raise DataError(
                f"{path} has the columns {', '.join(table.names)} but no `{name}`; its columns "
                f"must include {', '.join(_COLUMNS)}"
            )
    parts, _ = read_columns(table, _COLUMNS, ["user_id"], tick)
    text = parts[0]["item_id"]
    number = pc.match_substring_regex(text, r"^\d{1,18}$").fill_null(False)
    if not pc.all(number, min_count=0).as_py():
        row = pc.index(number, False).as_py()
        raise DataError(
            f"row {row + 2} of {path} has the item {text[row].as_py()!r}; items of such a folder "
            "are numbers"
        )
    return parts[0].set_column(2, "item_id", text.cast(pa.int64()))
