"""Fetch a public data set: download its files, or take those that are there, and import them."""

import ast
import gzip
import json
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchard.data.remote.download import Checksum, download, fetch_text, sha256_of
from orchard.data.remote.sources import RemoteData
from orchard.errors import DataError
from orchard.folders import atomic_file

RECORD = "source.json"
"""File beside the raw files: address, size, SHA-256 and date of each."""
_HEX = "0123456789abcdefABCDEF"


def fetch_files(
    data: RemoteData, raw: Path, *, tick: Callable[[int], None] = lambda _: None
) -> list[str]:
    """Download the files that are missing in `raw`, unpack archives, and record their digests.

    A file that is there is not downloaded; the record tells whether it is still the one that was.

    Returns a sentence for each file.

    Raises:
        DataError: a download fails, a file has changed since it was recorded, or an archive or a
            line of metadata is damaged.
    """
    raw.mkdir(parents=True, exist_ok=True)
    path = raw / RECORD
    record: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    said: list[str] = []
    for file in data.files:
        target = raw / file.path
        before = record.get(file.path, {})
        if target.is_file():
            sha256 = sha256_of(target)
            if before and before["sha256"] != sha256:
                raise DataError(
                    f"{target} has SHA-256 {sha256} and had {before['sha256']} when it was "
                    f"fetched; delete it to download it again, or {path} to take it as it is"
                )
            said.append(f"{target} is there")
            origin = before.get("url")
        else:
            stated = None if file.checksum_url is None else _stated(file.checksum_url)
            sha256 = download(file.url, target, checksum=stated, tick=tick)
            if file.python_lines:
                _as_json_lines(target)
                sha256 = sha256_of(target)
            said.append(f"{target} was downloaded from {file.url}")
            origin = file.url
        record[file.path] = before or {
            "url": origin,
            "bytes": target.stat().st_size,
            "sha256": sha256,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "page": data.page,
            "terms": data.terms,
        }
        with atomic_file(path) as partial:
            partial.write_text(json.dumps(record, indent=2) + "\n")
        if target.suffix == ".zip":
            _unpack(target, raw)
    return said


def _stated(url: str) -> Checksum:
    """Return the MD5 in a text such as `0123abcd  ml-1m.zip` or `MD5 (ml-1m.zip) = 0123abcd`."""
    text = fetch_text(url)
    digests = [word for word in text.split() if len(word) == 32 and set(word) <= set(_HEX)]
    if len(digests) != 1:
        raise DataError(f"{url} holds no MD5 but {text[:80]!r}")
    return Checksum(algorithm="md5", digest=digests[0])


def _as_json_lines(path: Path) -> None:
    """Rewrite a file of Python literals, one per line, as JSON lines."""
    with (
        gzip.open(path, "rt", encoding="utf-8") as lines,
        atomic_file(path) as partial,
        gzip.open(partial, "wt", encoding="utf-8", compresslevel=1) as out,
    ):
        for number, line in enumerate(lines, start=1):
            try:
                record = ast.literal_eval(line)
            except (SyntaxError, ValueError) as error:
                raise DataError(f"line {number} of {path} is no record: {line[:80]!r}") from error
            out.write(json.dumps(record) + "\n")


def _unpack(archive: Path, raw: Path) -> None:
    """Unpack an archive whose files are not all there; raises DataError."""
    try:
        with zipfile.ZipFile(archive) as packed:
            for member in packed.infolist():
                target = raw / member.filename
                if not target.resolve().is_relative_to(raw.resolve()):
                    raise DataError(f"{archive} wants to write {member.filename} outside of {raw}")
                if member.is_dir() or (
                    target.is_file() and target.stat().st_size == member.file_size
                ):
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with (
                    packed.open(member) as source,
                    atomic_file(target) as partial,
                    partial.open("wb") as out,
                ):
                    shutil.copyfileobj(source, out)
    except (zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{archive} is damaged ({error}); delete it and run again") from error
