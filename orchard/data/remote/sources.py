"""Public data sets by name: their files, how these are imported, and under what terms they come.

Names are `FAMILY/CATEGORY`, such as `amazon2018/Industrial_and_Scientific`, or one of `ALIASES`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from orchard.data.importers.read import ImportOptions
from orchard.errors import ConfigError

ALIASES = {
    "amazon_industrial": "minionerec/Industrial_and_Scientific",
    "amazon_instruments": "letter/Instruments",
}
"""Names that the run files use."""


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """File of a data set at its publisher."""

    url: str
    path: str
    """Place of the file in the folder of raw files."""
    checksum_url: str | None = None
    """Address of a text that contains the MD5 of the file."""
    python_lines: bool = False
    """Whether each line is a Python literal instead of JSON, as in the metadata of 2014."""


@dataclass(frozen=True, kw_only=True)
class RemoteData:
    """Data set at its publisher, and how to import it."""

    files: tuple[RemoteFile, ...]
    source: str
    """File or folder in the folder of raw files that is imported."""
    items: str | None = None
    """Item list in the folder of raw files."""
    options: ImportOptions
    page: str
    """Page of the publisher."""
    terms: str
    """Terms of use as the publisher states them."""


def find(name: str) -> RemoteData:
    """Return the data set of a name; raises ConfigError."""
    family, _, category = ALIASES.get(name, name).partition("/")
    if family not in FAMILIES or not category or category != PurePosixPath(category).name:
        raise ConfigError(
            f"there is no public data set {name!r}; choose one of {', '.join(ALIASES)}, or "
            f"FAMILY/CATEGORY with a family of {', '.join(FAMILIES)}"
        )
    return FAMILIES[family](category)


_UCSD = "https://mcauleylab.ucsd.edu/public_datasets/data"
_SNAP = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"
_GROUPLENS = "https://files.grouplens.org/datasets/movielens"
_GITHUB = "https://raw.githubusercontent.com"
_TERMS_OF_REVIEWS = "for research; no licence is stated, so ask the publisher before other uses"


def _reviews(
    reviews: str, meta: str, *, page: str, options: ImportOptions, python_lines: bool = False
) -> RemoteData:
    """Return a category of Amazon from the addresses of its reviews and of its metadata."""
    files = tuple(RemoteFile(url=url, path=PurePosixPath(url).name) for url in (reviews, meta))
    return RemoteData(
        files=(files[0], replace(files[1], python_lines=python_lines)),
        source=files[0].path,
        items=files[1].path,
        options=options,
        page=page,
        terms=_TERMS_OF_REVIEWS,
    )


def _amazon_2014(category: str) -> RemoteData:
    """Return a 5-core category of 2014 with the last two items of each user held out."""
    return _reviews(
        f"{_SNAP}/reviews_{category}_5.json.gz",
        f"{_SNAP}/meta_{category}.json.gz",
        page="https://cseweb.ucsd.edu/~jmcauley/datasets/amazon/links.html",
        options=ImportOptions(core=5, split="leave_one_out", title_words=0),
        python_lines=True,
    )


def _amazon_2018(category: str) -> RemoteData:
    """Return a 5-core category of 2018, split by time."""
    return _reviews(
        f"{_UCSD}/amazon_v2/categoryFilesSmall/{category}_5.json.gz",
        f"{_UCSD}/amazon_v2/metaFiles2/meta_{category}.json.gz",
        page="https://nijianmo.github.io/amazon/",
        options=ImportOptions(),
    )


def _amazon_2023(category: str) -> RemoteData:
    """Return a category of 2023 with all its reviews, filtered to 5-core and split by time."""
    return _reviews(
        f"{_UCSD}/amazon_2023/raw/review_categories/{category}.jsonl.gz",
        f"{_UCSD}/amazon_2023/raw/meta_categories/meta_{category}.jsonl.gz",
        page="https://amazon-reviews-2023.github.io/",
        options=ImportOptions(),
    )


def _movielens(category: str) -> RemoteData:
    """Return MovieLens of a size such as `1m` or `20m`, with the last two films held out."""
    name = f"ml-{category}"
    suffix, columns = "csv", dict[str, str]()
    if category == "1m":  # without a header
        suffix = "dat"
        columns = {"user": "1", "item": "2", "timestamp": "4"}
        columns |= {"items.item": "1", "items.title": "2"}
    return RemoteData(
        files=(
            RemoteFile(
                url=f"{_GROUPLENS}/{name}.zip",
                path=f"{name}.zip",
                checksum_url=f"{_GROUPLENS}/{name}.zip.md5",
            ),
        ),
        source=f"{name}/ratings.{suffix}",
        items=f"{name}/movies.{suffix}",
        options=ImportOptions(columns=columns, core=5, split="leave_one_out"),
        page="https://grouplens.org/datasets/movielens/",
        terms="research and no redistribution; see the README in the archive",
    )


def _minionerec(category: str) -> RemoteData:
    """Return a category in the split of MiniOneRec, with its semantic IDs."""
    base = f"{_GITHUB}/AkaliKong/MiniOneRec/HEAD/data/Amazon"
    split = f"{category}_5_2016-10-2018-11"
    paths = (
        *(f"{part}/{split}.csv" for part in ("train", "valid", "test")),
        *(f"index/{category}.{kind}.json" for kind in ("index", "item")),
    )
    return RemoteData(
        files=tuple(RemoteFile(url=f"{base}/{path}", path=path) for path in paths),
        source=".",
        options=ImportOptions(),
        page="https://github.com/AkaliKong/MiniOneRec",
        terms="Apache License 2.0 of the repository; the reviews are Amazon's, for research",
    )


def _letter(category: str) -> RemoteData:
    """Return a data set of LETTER, with its semantic IDs and the last two items held out."""
    base = f"{_GITHUB}/HonghuiBao2000/LETTER/HEAD/data/{category}"
    paths = [f"{category}.{kind}.json" for kind in ("inter", "index")]
    return RemoteData(
        files=tuple(RemoteFile(url=f"{base}/{path}", path=path) for path in paths),
        source=".",
        options=ImportOptions(),
        page="https://github.com/HonghuiBao2000/LETTER",
        terms="no licence is stated; ask the authors before other uses than research",
    )


FAMILIES: dict[str, Callable[[str], RemoteData]] = {
    "amazon2014": _amazon_2014,
    "amazon2018": _amazon_2018,
    "amazon2023": _amazon_2023,
    "movielens": _movielens,
    "minionerec": _minionerec,
    "letter": _letter,
}
"""Data sets of a family by category."""
