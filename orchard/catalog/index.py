"""Save and memory-map the trie of a catalog and the items of its leaves, in one file.

Processes on one machine share its pages; tensors are views of the file. Little-endian layout:

    magic 8 bytes | version u32 | length of the header u32 | size of the file u64 | header, JSON
    sections, each at a multiple of 64 bytes | SHA-256 of all preceding bytes, 32 bytes

The header contains the digest of the catalog and the type, offset and length of each section.

Shapes:  I items   X items that are not the first of their leaf   F queried leaves   F1 = F + 1
         M items of the queried leaves
"""

import hashlib
import json
import os
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from orchard import ragged
from orchard.catalog.catalog import Catalog
from orchard.catalog.trie import Trie, offset_type
from orchard.errors import DataError

_MAGIC, _VERSION = b"ORCHTRIE", 1
_FIXED = struct.Struct("<8sIIQ")
_ALIGN, _DIGEST_BYTES = 64, 32
_TRIE = ("code", "child_start", "level_start", "early_leaf")
_ITEMS = ("item_of_leaf", "extra_item_leaves")


@dataclass(frozen=True, kw_only=True)
class TrieIndex:
    """Immutable subset of a catalog that a search and its response need."""

    trie: Trie
    item_of_leaf: Int[np.ndarray, " I"]
    """Catalog rows grouped by leaf, in catalog order within one."""
    extra_item_leaves: Int[np.ndarray, " X"]
    """Leaf of each item that is not the first of its leaf, ascending. Few items share a semantic
    ID, so this array is far smaller than an array of starts with four or eight bytes per leaf."""

    def items(
        self, leaf: Int[np.ndarray, " F"]
    ) -> tuple[Int[np.ndarray, " M"], Int[np.ndarray, " F1"]]:
        """Return the catalog rows of the items of each leaf, ragged."""
        # A leaf starts behind one item per preceding leaf and their extra items.
        first, end = (
            bound + np.searchsorted(self.extra_item_leaves, bound) for bound in (leaf, leaf + 1)
        )
        return self.item_of_leaf[ragged.ranges(first, end - first)], ragged.starts(end - first)

    @cached_property
    def num_bytes(self) -> int:
        """Total size of all arrays in bytes."""
        return sum(array.nbytes for array in _sections(self).values())


def from_catalog(catalog: Catalog) -> TrieIndex:
    """Create the index of a catalog in memory."""
    count = np.diff(catalog.leaf_start)
    dtype = offset_type(len(catalog))
    return TrieIndex(
        trie=catalog.trie,
        item_of_leaf=catalog.item_of_leaf.astype(dtype),
        extra_item_leaves=np.repeat(np.arange(len(count)), count - 1).astype(dtype),
    )


def save(index: TrieIndex, path: Path) -> None:
    """Write the file atomically: a reader sees the old file or the new file, never a part."""
    sections = _sections(index)
    description: dict[str, Any] = {"catalogue": index.trie.catalog, "sections": {}}
    offset = 0
    for name, array in sections.items():  # offsets are relative to the end of the header
        description["sections"][name] = [array.dtype.str, offset, len(array)]
        offset += _padded(array.nbytes)
    header = json.dumps(description).encode()
    header += b" " * (_padded(_FIXED.size + len(header)) - _FIXED.size - len(header))
    size = _FIXED.size + len(header) + offset + _DIGEST_BYTES
    partial, sha256 = path.with_name(path.name + ".partial"), hashlib.sha256()
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("wb") as file:
        head = _FIXED.pack(_MAGIC, _VERSION, len(header), size) + header
        for data in (head, *(array.tobytes() for array in sections.values())):
            for chunk in (data, bytes(_padded(len(data)) - len(data))):
                file.write(chunk)
                sha256.update(chunk)
        file.write(sha256.digest())
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load(path: Path) -> TrieIndex:
    """Memory-map a file written by `save`, after its content is verified.

    Raises:
        DataError: the file is missing, no trie file, of another version, truncated or corrupted.
    """
    if not path.is_file():
        raise DataError(f"trie file {path} does not exist; build it from the items file")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_FIXED.size)
    if start[: len(_MAGIC)] != _MAGIC or size < _FIXED.size:
        raise DataError(f"{path} is no trie file; build it from the items file")
    _, version, length, expected = _FIXED.unpack(start)
    if version != _VERSION:
        raise DataError(
            f"trie file {path} has format {version}, this release reads {_VERSION}; "
            "build it again from the items file"
        )
    if size != expected:
        raise DataError(
            f"trie file {path} has {size} bytes of {expected}; copy it again, or build it again "
            "from the items file"
        )
    # Copy-on-write, because torch has no read-only tensors; nothing writes to them.
    content = np.memmap(path, dtype=np.uint8, mode="c")
    digest = hashlib.sha256(content[:-_DIGEST_BYTES].data).digest()
    if digest != content[-_DIGEST_BYTES:].tobytes():
        raise DataError(
            f"trie file {path} is corrupted: its SHA-256 starts with {digest.hex()[:12]} instead "
            f"of {content[-_DIGEST_BYTES:].tobytes().hex()[:12]}; build it again from the items "
            "file"
        )
    body = _FIXED.size + length
    description = json.loads(content[_FIXED.size : body].tobytes())
    section = {
        name: np.frombuffer(content, dtype=kind, count=count, offset=body + offset)
        for name, (kind, offset, count) in description["sections"].items()
    }
    return TrieIndex(
        trie=Trie(
            **{name: torch.from_numpy(section[name]) for name in _TRIE},
            catalog=description["catalogue"],
        ),
        **{name: section[name] for name in _ITEMS},
    )


def _sections(index: TrieIndex) -> dict[str, Int[np.ndarray, " _"]]:
    """Return the arrays of the file by name."""
    trie = {name: np.ascontiguousarray(getattr(index.trie, name).cpu().numpy()) for name in _TRIE}
    return trie | {name: np.ascontiguousarray(getattr(index, name)) for name in _ITEMS}


def _padded(num_bytes: int) -> int:
    """Round up to a multiple of the alignment."""
    return -(-num_bytes // _ALIGN) * _ALIGN
