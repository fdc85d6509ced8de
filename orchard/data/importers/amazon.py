"""Read Amazon review files: JSON lines, plain or gzip, as published in 2018 and in 2023.

2018: `reviewerID`, `asin`, `unixReviewTime`, metadata `asin`, `title`. 2023: `user_id`,
`parent_asin`, `timestamp`, metadata `parent_asin`, `title`.
"""

import re
from collections.abc import Sequence
from html import unescape
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.json as json

from orchard.data.importers.columns import log_of
from orchard.data.importers.flat import Tick
from orchard.data.importers.log import InteractionLog
from orchard.errors import DataError

REVIEWS = (("reviewerID", "asin", "unixReviewTime"), ("user_id", "parent_asin", "timestamp"))
"""Fields of user, item and time in the review files of 2018 and 2023."""
METADATA = (("asin", "title"), ("parent_asin", "title"))
"""Fields of item and title in the metadata files of 2018 and 2023."""

_BLOCK = 8 << 20
_TAG = re.compile(r"<[^>]*>")


def read_reviews(path: Path, tick: Tick) -> InteractionLog:
    """Read the interaction log of a review file.

    Raises:
        DataError: the file does not exist, a line is not valid JSON, the fields are of neither
            layout, or as `log_of`.
    """
    table = _read(path, REVIEWS, pa.int64(), tick)
    user, item, timestamp = (table.column(i) for i in range(3))
    return log_of(user, item, timestamp, where=path.name)


def read_metadata(path: Path, tick: Tick) -> tuple[Sequence[str], Sequence[str]]:
    """Read the identifier and the title of each item; markup is removed, the first title counts."""
    table = _read(path, METADATA, pa.string(), tick)
    title_of_item: dict[str, str] = {}
    for item_id, title in zip(
        table.column(0).to_pylist(), table.column(1).to_pylist(), strict=True
    ):
        if item_id and title:
            title_of_item.setdefault(item_id, " ".join(_TAG.sub(" ", unescape(title)).split()))
    return list(title_of_item), list(title_of_item.values())


def _read(path: Path, layouts: Sequence[Sequence[str]], last_type: Any, tick: Tick) -> Any:
    """Read the fields of the layout that the file has, the last field as `last_type`."""
    if not path.is_file():
        raise DataError(f"{path} does not exist; give a file that does")
    names = sorted({name for layout in layouts for name in layout})
    column_types = {name: pa.string() for name in names} | {
        layout[-1]: last_type for layout in layouts
    }
    # Reviews carry free-form fields, whose types change from line to line.
    options = json.ParseOptions(
        explicit_schema=pa.schema(list(column_types.items())), unexpected_field_behavior="ignore"
    )
    parts: list[Any] = []
    raw, rows, bytes_read = pa.OSFile(str(path)), 0, 0
    stream = pa.CompressedInputStream(raw, "gzip") if path.suffix == ".gz" else raw
    try:
        reader = json.open_json(
            stream, read_options=json.ReadOptions(block_size=_BLOCK), parse_options=options
        )
        for batch in reader:
            layout = _layout(batch, layouts, path)
            parts.append(batch.select(list(layout)))
            rows += len(batch)
            tick(raw.tell() - bytes_read)
            bytes_read = raw.tell()
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{path.name} is no file of JSON lines after line {rows}: {error}; files of 2014 are "
            "Python dictionaries, take those of 2018 or 2023"
        ) from error
    return pa.Table.from_batches(parts)


def _layout(batch: Any, layouts: Sequence[Sequence[str]], path: Path) -> Sequence[str]:
    """Return the layout whose first field has values in the batch."""
    for layout in layouts:
        if any(batch[name].null_count < len(batch) for name in layout[:1]):
            return layout
    expected = " or ".join(", ".join(layout) for layout in layouts)
    raise DataError(f"the lines of {path.name} have no {expected}; is it an Amazon file?")
