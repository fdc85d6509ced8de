"""Read a source of any supported format as examples."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from orchard.data.importers import lcrec, minionerec
from orchard.data.importers.examples import SplitExamples, of_log
from orchard.data.importers.flat import Labels, LogSource, find_log, read_log
from orchard.data.importers.item_list import attach_titles
from orchard.data.importers.log import InteractionLog, k_core, titled
from orchard.data.importers.roles import check_roles, no_column
from orchard.data.importers.tables.source import kind_of, sample, suffix_of
from orchard.data.importers.tables.table import Tick, inspect
from orchard.errors import ConfigError, DataError
from orchard.settings.data import GAP

Format = Literal["log", "amazon", "recbole", "minionerec", "lcrec"]
_AMAZON = ({"reviewerID", "asin", "unixReviewTime"}, {"user_id", "parent_asin", "timestamp"})
"""Fields of the review files of 2018 and of 2023."""


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Options of an import: columns, filters and split."""

    columns: Mapping[str, str] = field(default_factory=dict[str, str])
    """Column of each role of `roles.ROLES` whose name differs from `roles.COLUMNS`."""
    core: int | None = None
    """Minimum number of events of each user and item; by default 5 for Amazon reviews, else no
    minimum."""
    title_words: int | None = None
    """Maximum number of words of a title, where items without a title are removed; by default 20
    for Amazon reviews, else no filter. 0 is no filter either."""
    split: Literal["chronological", "leave_one_out"] | None = None
    """Rule of the split; by default leave-one-out for LC-Rec folders, else chronological."""
    max_history: int = 50
    labels: Labels | None = None
    """Treatment of events whose label is 0: drop (`positive`) or keep (`all`) them; must
    be given if there are any."""
    encoding: str | None = None
    """Encoding of text files; detected by default."""
    context: Mapping[str, str] = field(default_factory=dict[str, str])
    """Column of each name of context that is written beside the histories; `gap` without a column
    writes the times of the events."""


def format_of(source: Path) -> Format:
    """Detect the format of a file or folder by names, and that of JSON lines by their fields.

    Raises:
        DataError: the source does not exist, or is of no known format.
    """
    if not source.exists():
        raise DataError(f"{source} does not exist; give a file or a folder that does")
    if source.is_dir():
        if any(source.glob("**/*.inter.json")):
            return "lcrec"
        if any(any(source.glob(f"**/{name}")) for name in ("*.index.json", "info/*.txt")):
            return "minionerec"
        return "recbole" if any(source.glob("*.inter")) else "log"
    if source.name.endswith(".inter.json"):
        raise DataError(
            f"{source.name} is one file of an LC-Rec or LETTER folder; give {source.parent}"
        )
    if kind_of(source) == "json":
        is_empty = source.stat().st_size == 0 or not sample(source, 1 << 10)[0].strip()
        fields = set[str]() if is_empty else set(inspect(source).names)
        return "amazon" if is_empty or any(names <= fields for names in _AMAZON) else "log"
    if suffix_of(source) == ".inter":
        return "recbole"
    if kind_of(source) is not None:
        return "log"
    raise DataError(
        f"{source.name} is none of *.csv, *.tsv, *.txt, *.dat, *.inter, *.json[l], each also "
        "packed as *.gz, *.bz2, *.zst or *.xz, nor *.parquet or a folder of them; convert it to one"
    )


def read(source: Path, items: Path | None, choices: ImportOptions, tick: Tick) -> SplitExamples:
    """Read the examples of a source.

    Args:
        source: file or folder.
        items: list of items with titles, or Amazon's metadata.
        choices: filters and split; a MiniOneRec folder is split already and takes none.
        tick: progress callback, called with the number of bytes read.

    Raises:
        ConfigError: an option does not apply to the format.
        DataError: the source cannot be read; see the readers.
    """
    check_roles(choices.columns)
    source_format = format_of(source)
    if source_format in ("minionerec", "lcrec"):
        return _folder(source, source_format, items, choices, tick)
    log = _log(source, source_format, items, choices, tick)
    max_title_words, min_events = choices.title_words, choices.core
    if source_format == "amazon":
        max_title_words = 20 if max_title_words is None else max_title_words
        min_events = min_events or 5
    if choices.context.get(GAP) == "":
        log = replace(log, context={**log.context, "timestamp": log.timestamp})
    if max_title_words:
        log = titled(log, most_words=max_title_words)
    if min_events is not None:
        log = k_core(log, min_events)
    return of_log(log, split=choices.split or "chronological", max_history=choices.max_history)


def _folder(
    source: Path, source_format: Format, items: Path | None, choices: ImportOptions, tick: Tick
) -> SplitExamples:
    """Read a folder that has items of its own; one of MiniOneRec has splits, too."""
    given = [items, choices.core, choices.title_words, choices.columns or None, choices.labels]
    given.append(choices.context or None)
    is_split = source_format == "minionerec"
    if any(option is not None for option in given) or (
        choices.split not in (None, "chronological")
        if is_split
        else choices.split == "chronological"
    ):
        name, own = ("a MiniOneRec", "splits") if is_split else ("an LC-Rec", "sequences")
        raise ConfigError(
            f"{source} is {name} folder with items and {own} of its own"
            + ("" if is_split else ", in order but without times")
            + "; leave --items, --column, --context, --labels, --core, --title-words and --split "
            "out"
        )
    if is_split:
        return minionerec.read_folder(source, tick)
    return lcrec.read_folder(source, tick, max_history=choices.max_history)


def _log(
    source: Path, source_format: Format, items: Path | None, choices: ImportOptions, tick: Tick
) -> InteractionLog:
    """Read a log and the titles of its items."""
    if source_format == "amazon" and items is None:
        raise ConfigError(
            f"{source.name} holds reviews without titles; give the metadata with --items FILE"
        )
    required = items is not None
    path = source
    if source_format == "recbole":
        path = _inter(source)
        beside = path.with_name(path.name.replace(".inter", ".item"))
        items = items or (beside if beside.is_file() else None)
    columns = choices.columns
    found = find_log(
        path, columns, encoding=choices.encoding, has_items=items is not None,
        context={name: column for name, column in choices.context.items() if column},
    )  # fmt: skip
    _check_columns(found, columns, items, choices.encoding)
    log = read_log(found, choices.labels, tick)
    if items is None:
        return log
    return attach_titles(
        log, found, items, columns, tick, encoding=choices.encoding, required=required
    )


def _check_columns(
    source: LogSource, columns: Mapping[str, str], items: Path | None, encoding: str | None
) -> None:
    """Raise DataError if a column that was named is in neither file; no data are read yet."""
    listed = inspect(items, encoding=encoding) if items is not None else None
    for role, name in columns.items():
        in_list = listed is not None and name in listed.names
        if role.startswith("items."):
            if listed is None:
                raise ConfigError(
                    f"--column {role}={name} needs an item list; give it with --items"
                )
            if not in_list:
                raise no_column(listed, role, name)
        elif name not in source.table.names and not (role == "title" and in_list):
            raise no_column(listed if role == "title" and listed else source.table, role, name)


def _inter(source: Path) -> Path:
    """Return the one interaction file of a RecBole folder, or the file itself."""
    files = sorted(source.glob("*.inter")) if source.is_dir() else [source]
    if len(files) != 1:
        raise DataError(
            f"{source} holds {len(files)} files *.inter ({', '.join(f.name for f in files)}); "
            "give the one to import"
        )
    return files[0]


def size_of(*paths: Path | None) -> int:
    """Return the total bytes of files and folders, the sum of all progress callbacks."""
    files = [f for path in paths if path for f in (path.rglob("*") if path.is_dir() else [path])]
    return sum(file.stat().st_size for file in files if file.is_file())
