"""Read the items of MiniOneRec, LC-Rec and LETTER folders: `*.index.json` and `*.item.json`.

An index maps an item's number to its codes, `["<a_1>", "<b_2>", "<c_3>"]`; an item file maps it to
its title.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from orchard.data.importers.log import ItemTable
from orchard.errors import DataError

_CODE = re.compile(r"<([a-z])_(\d+)>")


def read_index(folder: Path) -> ItemTable | None:
    """Read the items of the index file with their titles, or return None without an index file.

    Raises:
        DataError: there are several index or item files, or one cannot be read.
    """
    pattern = "**/*.index.json" if list(folder.glob("**/*.index.json")) else "**/*.index*.json"
    if not list(folder.glob(pattern)):
        return None
    path = only(folder, pattern, "index")
    titles = read_titles(folder)
    sid_and_title: dict[int, tuple[str, str]] = {}
    for key, code_tokens in read_json(path).items():
        if not isinstance(code_tokens, list):
            raise DataError(f"{path} holds {code_tokens!r} for item {key}; it must hold its codes")
        number = item_number(key, path)
        sid_and_title[number] = (
            "".join(str(token) for token in code_tokens),
            titles.get(number, ""),
        )
    return item_table(sid_and_title)


def read_titles(folder: Path) -> dict[int, str]:
    """Read the title of each item of the item file, if there is one."""
    if not list(folder.glob("**/*.item.json")):
        return {}
    path = only(folder, "**/*.item.json", "item")
    titles: dict[int, str] = {}
    for key, about in read_json(path).items():
        title = about.get("title") if isinstance(about, dict) else about
        titles[item_number(key, path)] = " ".join(str(title or "").split())
    return titles


def item_table(sid_and_title: dict[int, tuple[str, str]]) -> ItemTable:
    """Return the items by number, with the codes of their semantic IDs."""
    ids = sorted(sid_and_title)
    if not ids:
        raise DataError("the index file lists no items; at least one is needed")
    return ItemTable(
        item_id=np.array(ids, dtype=np.int64),
        title=tuple(sid_and_title[i][1] for i in ids),
        sid=tuple(_codes(sid_and_title[i][0], i) for i in ids),
    )


def rows_of(item_id: Int64[np.ndarray, " N"], items: ItemTable) -> Int64[np.ndarray, " N"]:
    """Return the row of each item in `items`; raises DataError if one is not there."""
    order = np.argsort(items.item_id, kind="stable")
    position = np.searchsorted(items.item_id, item_id, sorter=order).clip(max=len(items) - 1)
    rows = order[position]
    unknown = np.flatnonzero(items.item_id[rows] != item_id)
    if len(unknown):
        raise DataError(
            f"item {item_id[unknown[0]]} of a split has no semantic ID ({len(unknown)} such "
            "references); add it to the index file"
        )
    return rows


def item_number(key: str, path: Path) -> int:
    """Return the number of an item; raises DataError if it is none."""
    if not re.fullmatch(r"\d{1,18}", key):
        raise DataError(f"{path} names an item {key!r}; items of such a folder are numbers")
    return int(key)


def _codes(text: str, item: int) -> tuple[int, ...]:
    """Parse a semantic ID such as `<a_1><b_2><c_3>`."""
    codes = _CODE.findall(text)
    levels = [level for level, _ in codes]
    if (
        not codes
        or levels != [chr(ord("a") + i) for i in range(len(codes))]
        or "".join(f"<{level}_{code}>" for level, code in codes) != text.strip()
    ):
        raise DataError(
            f"item {item} has the semantic ID {text!r}; it must read like <a_1><b_2><c_3>"
        )
    return tuple(int(code) for _, code in codes)


def only(folder: Path, pattern: str, role: str) -> Path:
    """Return the one file of the folder that matches the pattern; raises DataError."""
    matches = sorted(folder.glob(pattern))
    if len(matches) != 1:
        names = ", ".join(str(path.relative_to(folder)) for path in matches) or "none"
        raise DataError(
            f"{folder} must hold one {role} file ({pattern.removeprefix('**/')}), not {names}; "
            "leave one data set in the folder"
        )
    return matches[0]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises DataError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise DataError(f"{path} is not valid JSON: {error}; write it again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a {type(value).__name__}; it must map items or users")
    return value
