"""The tokenizer bundle: a versioned folder with everything that gives new items semantic IDs.

bundle-N.json               version N: how items are embedded and quantized, and the files below
codebooks.safetensors       codebooks of each level, and the map from embeddings to their space
titles.json, .safetensors   vocabulary of TF-IDF, and its weights with the axes of the SVD
items-N-*.parquet           items that version N added, with their semantic IDs and distances
quality-N.json              quality of the semantic IDs of version N, and what it added

A version is written once and never changed. It is there as soon as its `bundle-N.json` is, and
names every other file with its digest. Appending writes version N + 1, with all items of version N
as they were.

Shapes:  D dimensions of the codebooks
"""

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3
from jaxtyping import Float32
from safetensors import SafetensorError
from safetensors.numpy import load, save

from orchard.catalog.catalog import Catalog
from orchard.errors import CatalogError, DataError
from orchard.folders import atomic_dir
from orchard.semantic_ids.item_table import ItemTable, concatenated, digest_of
from orchard.semantic_ids.projection import Projection

if TYPE_CHECKING:
    from orchard.semantic_ids.title_encoder import TitleEncoder

FORMAT = 1
"""Format of the folder; a bundle of a later one is refused."""
BUNDLE = "sids"
"""Name of a bundle's folder beside the items, and in a policy folder."""
CODEBOOKS, TITLES, TITLE_ARRAYS = "codebooks.safetensors", "titles.json", "titles.safetensors"
_MANIFEST = re.compile(r"bundle-([1-9]\d*)\.json")


@dataclass(frozen=True, kw_only=True)
class Description:
    """Content of `bundle-N.json` that is the same in all versions of a bundle."""

    source: str
    """Source of the embeddings: titles, model, interactions or given."""
    origin: str
    """Source of the embeddings, in words."""
    dimensions: int
    """Dimensions of an embedding."""
    least_length: float
    """Length up to which an embedding says nothing about its item."""
    quantiser: str
    """Name of the quantizer."""
    collisions: str
    """Name of the collision policy."""
    level_size: tuple[int, ...]
    """Number of codes at each level of the semantic IDs."""
    model: str = ""
    """Name of the encoder's folder."""
    model_digest: str = ""
    """Digest of the encoder's folder (see `digest_of_folder`)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Bundle:
    """One version of a tokenizer bundle."""

    folder: Path
    version: int
    digest: str
    """Digest of `bundle-N.json`, hence of all files that it names."""
    description: Description
    projection: Projection
    books: tuple[Float32[np.ndarray, "_ D"], ...]
    """Codebook of each level of the quantizer."""
    table: ItemTable
    """Items of this version and those before it."""
    files: Mapping[str, str] = field(repr=False)
    """Digest of each file of this version."""

    @classmethod
    def open(cls, folder: Path, version: int | None = None) -> "Bundle":
        """Read a version of a bundle, by default the newest.

        Raises:
            DataError: the folder holds no bundle or no such version, is of a later format, or a
                file is missing or does not have the digest that the version names.
        """
        found = versions(folder)
        if not found:
            raise DataError(
                f"{folder} holds no tokenizer bundle (bundle-1.json); give the folder that "
                "`orchard data sids` wrote next to the items"
            )
        number = found[-1] if version is None else version
        if number not in found:
            raise DataError(
                f"{folder} has no version {number}; choose from {', '.join(map(str, found))}"
            )
        path = folder / f"bundle-{number}.json"
        text = path.read_bytes()
        try:
            tree = json.loads(text)
            if tree["format"] > FORMAT:
                raise DataError(
                    f"{path} has format {tree['format']}, this version of Orchard reads up to "
                    f"{FORMAT}; update Orchard"
                )
            level_size = tuple(tree["description"].pop("level_size"))
            description = Description(**tree["description"], level_size=level_size)
            files: dict[str, str] = tree["files"]
            for name, digest in files.items():
                _check(folder / name, digest)
            arrays = load((folder / CODEBOOKS).read_bytes())
            books = [arrays[f"book.{n}"] for n in range(len(arrays)) if f"book.{n}" in arrays]
            bundle = cls(
                folder=folder,
                version=number,
                digest=blake3(text).hexdigest(),
                description=description,
                projection=Projection.from_arrays(arrays),
                books=tuple(books),
                table=concatenated([ItemTable.read(folder / name) for name in tree["items"]]),
                files=files,
            )
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise DataError(f"{path} is damaged: {error!r}; copy the bundle again") from error
        if bundle.table.digest != tree["table"]:
            raise DataError(f"the items of {path} are damaged; copy the bundle again")
        return bundle

    @cached_property
    def titles(self) -> "TitleEncoder | None":
        """Encoder of titles, read on first use; None where items are embedded otherwise.

        Raises:
            DataError: its files are damaged.
        """
        if TITLES not in self.files:
            return None
        from orchard.semantic_ids.title_encoder import TitleEncoder  # loads scikit-learn

        try:
            arrays = load((self.folder / TITLE_ARRAYS).read_bytes())
            text = (self.folder / TITLES).read_text(encoding="utf-8")
            return TitleEncoder.from_state(text, arrays)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise DataError(
                f"the titles of {self.folder} are damaged: {error!r}; copy the bundle again"
            ) from error

    def copy(self, folder: Path) -> None:
        """Write this version alone into another folder, as a whole, in place of what is there.

        Raises:
            DataError: a file is missing or was changed since it was opened.
        """
        manifest = f"bundle-{self.version}.json"
        with atomic_dir(folder) as partial:
            for name, digest in {**self.files, manifest: self.digest}.items():
                _check(self.folder / name, digest)
                shutil.copyfile(self.folder / name, partial / name)

    def is_in(self, folder: Path) -> bool:
        """Return whether a folder has this version, by the digest of its `bundle-N.json`."""
        manifest = folder / f"bundle-{self.version}.json"
        return manifest.is_file() and _digest(manifest) == self.digest

    def check_catalog(self, catalog: Catalog, *, remedy: str) -> None:
        """Raise CatalogError unless every item of a catalog has its semantic ID of this bundle.

        The bundle may have more items, which came to another part of the catalog or later.

        Args:
            catalog: the catalog.
            remedy: what to do about another one, for the message.
        """
        codes, own = catalog.plain_codes, self.table.sid
        row, is_known = self.table.lookup(catalog.item_id)
        if codes.shape[1] == own.shape[1]:
            is_same = is_known & (own[row] == codes).all(axis=1)
        else:
            is_same = np.zeros(len(catalog), dtype=np.bool_)
        if is_same.all():
            return
        first = int(np.argmin(is_same))
        given = own[row[first]].tolist() if is_known[first] else "none"
        raise CatalogError(
            f"the tokenizer bundle {self.folder} has the items {self.table.digest[:12]} and the "
            f"catalog the items {digest_of(catalog.item_id, codes)[:12]}: item "
            f"{catalog.item_id[first]} has semantic ID {given} in the bundle and "
            f"{codes[first].tolist()} in the catalog ({int((~is_same).sum())} of {len(catalog)} "
            f"items differ); {remedy}",
            code="catalog.other_bundle",
        )


def versions(folder: Path) -> list[int]:
    """Return the versions of a bundle's folder, ascending; none where it is no bundle."""
    if not folder.is_dir():
        return []
    matches = (_MANIFEST.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def write(
    folder: Path,
    description: Description,
    projection: Projection,
    books: tuple[Float32[np.ndarray, "_ D"], ...],
    table: ItemTable,
    quality: Mapping[str, Any],
    titles: "TitleEncoder | None" = None,
) -> None:
    """Write version 1 of a bundle as a whole, in place of one that is there."""
    arrays = {**projection.arrays(), **{f"book.{n}": book for n, book in enumerate(books)}}
    contents: dict[str, bytes] = {CODEBOOKS: _safetensors(arrays)}
    if titles is not None:
        text, title_arrays = titles.to_state()
        contents[TITLES] = text.encode()
        contents[TITLE_ARRAYS] = _safetensors(title_arrays)
    with atomic_dir(folder) as partial:
        for name, content in contents.items():
            (partial / name).write_bytes(content)
        files = {name: blake3(content).hexdigest() for name, content in contents.items()}
        _publish(partial, 1, description, files, [], table, table, quality, parent="")


def append(bundle: Bundle, added: ItemTable, quality: Mapping[str, Any]) -> Bundle:
    """Write the version after `bundle`, with the items `added` behind its own; return it.

    Raises:
        DataError: another append wrote that version meanwhile.
    """
    names = json.loads((bundle.folder / f"bundle-{bundle.version}.json").read_text())["items"]
    _publish(
        bundle.folder,
        bundle.version + 1,
        bundle.description,
        dict(bundle.files),
        names,
        added,
        concatenated([bundle.table, added]),
        quality,
        parent=bundle.digest,
    )
    return Bundle.open(bundle.folder, bundle.version + 1)


def _publish(
    folder: Path,
    version: int,
    description: Description,
    files: dict[str, str],
    names: list[str],
    added: ItemTable,
    table: ItemTable,
    quality: Mapping[str, Any],
    *,
    parent: str,
) -> None:
    """Write the files of a version, and last its `bundle-N.json`, which two cannot create."""
    token = uuid.uuid4().hex[:8]
    part, report = f"items-{version}-{token}.parquet", f"quality-{version}-{token}.json"
    manifest = folder / f".bundle-{token}.partial"
    is_published = False
    try:
        added.write(folder / part)
        (folder / report).write_text(json.dumps(quality, indent=2) + "\n")
        files = {name: digest for name, digest in files.items() if not name.startswith("quality-")}
        files |= {name: _digest(folder / name) for name in (part, report)}
        tree = {
            "format": FORMAT,
            "version": version,
            "parent": parent,
            "description": asdict(description),
            "num_items": len(table),
            "num_added": len(added),
            "table": table.digest,
            "items": [*names, part],
            "files": files,
        }
        manifest.write_text(json.dumps(tree, indent=2) + "\n")
        os.link(manifest, folder / f"bundle-{version}.json")
        is_published = True
    except FileExistsError as error:
        raise DataError(
            f"another command appended version {version} to {folder} in the meantime; "
            "run this one again to continue from there"
        ) from error
    except OSError as error:
        raise DataError(
            f"version {version} of {folder} cannot be written: {error.strerror}; put the bundle "
            "on writable storage with hard links and free space"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            manifest.unlink(missing_ok=True)
            for name in () if is_published else (part, report):
                (folder / name).unlink(missing_ok=True)


def digest_of_folder(folder: Path) -> str:
    """Return the BLAKE3 of the names and contents of all files in a folder."""
    hasher = blake3()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        hasher.update(f"{path.relative_to(folder).as_posix()}\n{_digest(path)}\n".encode())
    return hasher.hexdigest()


def _digest(path: Path) -> str:
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()


def _check(path: Path, digest: str) -> None:
    """Raise DataError if a file is missing or was changed."""
    if not path.is_file():
        raise DataError(f"{path} is missing; copy the bundle again")
    if _digest(path) != digest:
        raise DataError(f"{path} is damaged or was changed; copy the bundle again")


def _safetensors(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Serialize arrays, which the library expects to be contiguous."""
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
