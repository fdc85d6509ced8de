"""Public data sets from files that are there, or from a copy of their publisher's folder."""

import gzip
import hashlib
import json
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cluster.cli.datasets import fetch_dataset
from orchard.data.importers.read import ImportOptions
from orchard.data.remote import sources
from orchard.data.remote.fetch import RECORD, fetch_files
from orchard.data.remote.sources import ALIASES, FAMILIES, RemoteData, RemoteFile, find
from orchard.errors import ConfigError, DataError
from tests.orchard.data.importers.test_minionerec import GIVEN, minionerec_folder

RATINGS = [(u, 1 + (u * 7 + t * 3) % 9, 4, 1000 + t) for u in range(1, 8) for t in range(9)]


def movielens(folder: Path) -> RemoteData:
    """Publish a tiny MovieLens in a folder, with the MD5 beside it."""
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "ml-1m.zip", "w") as archive:
        archive.writestr(
            "ml-1m/ratings.dat", "".join("::".join(map(str, row)) + "\n" for row in RATINGS)
        )
        films = "".join(f"{i}::Caf\u00e9 {i} (1999)::Drama\n" for i in range(1, 10))
        archive.writestr("ml-1m/movies.dat", films.encode("latin-1"))
    digest = hashlib.md5((folder / "ml-1m.zip").read_bytes()).hexdigest()
    (folder / "ml-1m.zip.md5").write_text(f"MD5 (ml-1m.zip) = {digest}\n")
    real = find("movielens/1m")
    file = RemoteFile(
        url=(folder / "ml-1m.zip").as_uri(),
        path="ml-1m.zip",
        checksum_url=(folder / "ml-1m.zip.md5").as_uri(),
    )
    return RemoteData(
        files=(file,), source=real.source, items=real.items, options=real.options, page="", terms=""
    )


def test_movielens_comes_from_its_archive_to_a_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = movielens(tmp_path / "there")
    monkeypatch.setitem(sources.FAMILIES, "movielens", lambda _: remote)
    fetch_dataset("movielens/1m", tmp_path / "root", overwrite=False)
    items = pq.read_table(tmp_path / "root" / "movielens" / "1m" / "items.parquet")
    assert set(items["title"].to_pylist()) == {f"Café {i} (1999)" for i in range(1, 10)}
    test = pq.read_table(tmp_path / "root" / "movielens" / "1m" / "test.parquet")
    assert len(test) == 7  # the last film of each user
    record = json.loads((tmp_path / "root" / "raw" / "movielens" / "1m" / RECORD).read_text())
    assert (
        record["ml-1m.zip"]["sha256"]
        == hashlib.sha256((tmp_path / "there" / "ml-1m.zip").read_bytes()).hexdigest()
    )


def test_files_that_are_there_are_not_downloaded(tmp_path: Path) -> None:
    raw = minionerec_folder(tmp_path / "raw" / "minionerec" / "Shop", GIVEN)
    (raw / "index").mkdir(exist_ok=True)
    for part in ("train", "valid", "test"):
        (raw / part / "Shop_5.csv").rename(raw / part / "Shop_5_2016-10-2018-11.csv")
    fetch_dataset("minionerec/Shop", tmp_path, overwrite=False)
    rows = pq.read_table(tmp_path / "minionerec" / "Shop" / "train.parquet")
    assert rows["target"].to_pylist() == [target for _, _, target in GIVEN["train"]]
    with pytest.raises(DataError, match="holds a data set already"):
        fetch_dataset("minionerec/Shop", tmp_path, overwrite=False)


def test_a_file_that_changed_after_it_was_fetched_is_refused(tmp_path: Path) -> None:
    remote = movielens(tmp_path / "there")
    fetch_files(remote, tmp_path / "raw")
    with (tmp_path / "raw" / "ml-1m.zip").open("ab") as archive:
        archive.write(b"x")
    with pytest.raises(DataError, match="delete it to download it again"):
        fetch_files(remote, tmp_path / "raw")


def test_metadata_of_python_literals_become_json_lines(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "meta.json.gz", "wt") as lines:
        lines.write("{'asin': 'B1', 'title': \"Bob's\"}\n")
    remote = RemoteData(
        files=(
            RemoteFile(
                url=(tmp_path / "meta.json.gz").as_uri(), path="meta.json.gz", python_lines=True
            ),
        ),
        source="", options=ImportOptions(), page="", terms="",
    )  # fmt: skip
    fetch_files(remote, tmp_path / "raw")
    with gzip.open(tmp_path / "raw" / "meta.json.gz", "rt") as lines:
        assert json.loads(lines.read()) == {"asin": "B1", "title": "Bob's"}
    fetch_files(remote, tmp_path / "raw")  # the record is that of the rewritten file
    with gzip.open(tmp_path / "meta.json.gz", "wt") as lines:
        lines.write("{'asin': __import__('os')}\n")
    with pytest.raises(DataError, match="line 1 of .* is no record"):
        fetch_files(remote, tmp_path / "again")


def test_an_archive_may_not_write_outside_of_its_folder(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("../escaped.txt", "x")
    remote = RemoteData(
        files=(RemoteFile(url=(tmp_path / "a.zip").as_uri(), path="a.zip"),),
        source="", options=ImportOptions(), page="", terms="",
    )  # fmt: skip
    with pytest.raises(DataError, match="outside of"):
        fetch_files(remote, tmp_path / "raw")
    assert not (tmp_path / "escaped.txt").exists()


@pytest.mark.parametrize("name", ["nothing", "amazon2018", "amazon2018/", "movielens/../x", "x/y"])
def test_names_that_mean_nothing_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="choose one of amazon_industrial"):
        find(name)


@pytest.mark.parametrize("name", [*ALIASES, *(f"{family}/Beauty" for family in FAMILIES)])
def test_every_family_says_where_its_files_come_from(name: str) -> None:
    remote = find(name)
    assert remote.files
    assert all(file.url.startswith("https://") for file in remote.files)
    assert remote.page
    assert remote.terms
    is_folder = remote.source == "."
    assert (
        is_folder
        or remote.files[0].path.endswith(".zip")
        or remote.source in {file.path for file in remote.files}
    )
