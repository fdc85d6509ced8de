"""Read a source of any supported format as examples."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from orchard.data.importers import amazon, flat, minionerec
from orchard.data.importers.examples import SplitExamples, of_log
from orchard.data.importers.flat import Tick
from orchard.data.importers.log import InteractionLog, k_core, titled, with_titles
from orchard.errors import ConfigError, DataError

Format = Literal["log", "amazon", "recbole", "minionerec"]


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Options of an import: columns, filters and split."""

    columns: Mapping[str, str] = field(default_factory=dict[str, str])
    """Column of each role whose name differs from `flat.COLUMNS`."""
    core: int | None = None
    """Minimum number of events of each user and item; by default 5 for Amazon reviews, else no
    minimum."""
    title_words: int | None = None
    """Maximum number of words of a title, where items without a title are removed; by default 20
    for Amazon reviews, else no filter."""
    split: Literal["chronological", "leave_one_out"] = "chronological"
    max_history: int = 50


def format_of(source: Path) -> Format:
    """Detect the format of a file or folder by file names; raise DataError if it does not exist."""
    if not source.exists():
        raise DataError(f"{source} does not exist; give a file or a folder that does")
    if source.is_dir():
        if any(any(source.glob(f"**/{name}")) for name in ("*.index.json", "info/*.txt")):
            return "minionerec"
        return "recbole" if any(source.glob("*.inter")) else "log"
    suffixes = [s for s in source.suffixes if s != ".gz"]
    suffix = suffixes[-1] if suffixes else ""
    if suffix in (".json", ".jsonl"):
        return "amazon"
    if suffix == ".inter":
        return "recbole"
    if suffix in (".csv", ".tsv", ".parquet") and source.suffix != ".gz":
        return "log"
    raise DataError(
        f"{source.name} is none of *.csv, *.tsv, *.parquet, *.inter, *.json[l][.gz] or a folder of "
        "them; convert it to one"
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
    source_format = format_of(source)
    if source_format == "minionerec":
        importer_options = [items, choices.core, choices.title_words, choices.columns or None]
        if (
            any(option is not None for option in importer_options)
            or choices.split != "chronological"
        ):
            raise ConfigError(
                f"{source} is a MiniOneRec folder with items and splits of its own; leave --items, "
                "--column, --core, --title-words and --split out"
            )
        return minionerec.read_folder(source, tick)
    log = _LOGS[source_format](source, items, choices.columns, tick)
    max_title_words = (
        choices.title_words if source_format != "amazon" else choices.title_words or 20
    )
    min_events = choices.core if source_format != "amazon" else choices.core or 5
    if max_title_words is not None:
        log = titled(log, most_words=max_title_words)
    if min_events is not None:
        log = k_core(log, min_events)
    return of_log(log, split=choices.split, max_history=choices.max_history)


def _plain(
    source: Path, items: Path | None, columns: Mapping[str, str], tick: Tick
) -> InteractionLog:
    log = flat.read_log(source, columns, tick)
    if items is None:
        return log
    return replace(log, items=with_titles(log.items, *flat.read_titles(items, columns, tick)))


def _amazon(
    source: Path, items: Path | None, columns: Mapping[str, str], tick: Tick
) -> InteractionLog:
    if columns:
        raise ConfigError("the fields of Amazon reviews are known; leave --column out")
    if items is None:
        raise ConfigError(
            f"{source.name} holds reviews without titles; give the metadata with --items FILE"
        )
    log = amazon.read_reviews(source, tick)
    return replace(log, items=with_titles(log.items, *amazon.read_metadata(items, tick)))


def _recbole(
    source: Path, items: Path | None, columns: Mapping[str, str], tick: Tick
) -> InteractionLog:
    """Read the `.inter` file, and the `.item` file of the same name if there is one."""
    files = sorted(source.glob("*.inter")) if source.is_dir() else [source]
    if len(files) != 1:
        raise DataError(
            f"{source} holds {len(files)} files *.inter ({', '.join(f.name for f in files)}); "
            "give the one to import"
        )
    item_file = files[0].with_suffix(".item")
    return _plain(files[0], items or (item_file if item_file.is_file() else None), columns, tick)


_LOGS: Mapping[str, Callable[[Path, Path | None, Mapping[str, str], Tick], InteractionLog]] = {
    "log": _plain,
    "amazon": _amazon,
    "recbole": _recbole,
}
"""Reader of each format that is a log."""


def size_of(*paths: Path | None) -> int:
    """Return the total bytes of files and folders, the sum of all progress callbacks."""
    files = [f for path in paths if path for f in (path.rglob("*") if path.is_dir() else [path])]
    return sum(file.stat().st_size for file in files if file.is_file())
