"""A catalog's trie and the items of its leaves in one file that is mapped, not read.

Processes of one machine share its pages, and a tensor of it is a view of the file. Little-endian:

    magic 8 bytes | version u32 | length of the header u32 | size of the file u64 | header, JSON
    sections, each at a multiple of 64 bytes | SHA-256 of everything before, 32 bytes

The header gives the catalog's digest and, by name, type, offset and length of each section.

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
    """What a search and the answer to it need of a catalog. Immutable."""

    trie: Trie
    item_of_leaf: Int[np.ndarray, " I"]
    """Catalog rows grouped by leaf, in catalog order within one."""
    extra_item_leaves: Int[np.ndarray, " X"]
    """For each item but the first of its leaf that leaf, ascending: as few items share a semantic
    ID, this says in a few bytes what an array of starts says in four or eight per leaf."""

    def items(
        self, leaf: Int[np.ndarray, " F"]
    ) -> tuple[Int[np.ndarray, " M"], Int[np.ndarray, " F1"]]:
        """Catalog rows of the items of each leaf, ragged."""
        first, end = (at + np.searchsorted(self.extra_item_leaves, at) for at in (leaf, leaf + 1))
        return self.item_of_leaf[ragged.ranges(first, end - first)], ragged.starts(end - first)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(part.nbytes for part in _sections(self).values())


def from_catalog(catalog: Catalog) -> TrieIndex:
    """The index of a catalog in memory."""
    count = np.diff(catalog.leaf_start)
    narrow = offset_type(len(catalog))
    return TrieIndex(
        trie=catalog.trie,
        item_of_leaf=catalog.item_of_leaf.astype(narrow),
        extra_item_leaves=np.repeat(np.arange(len(count)), count - 1).astype(narrow),
    )


def save(index: TrieIndex, path: Path) -> None:
    """Write the file; a reader finds the old one or the new one, never a part."""
    sections = _sections(index)
    facts: dict[str, Any] = {"catalogue": index.trie.catalog, "sections": {}}
    offset = 0
    for name, part in sections.items():  # offsets are counted from the end of the header
        facts["sections"][name] = [part.dtype.str, offset, len(part)]
        offset += _padded(part.nbytes)
    header = json.dumps(facts).encode()
    header += b" " * (_padded(_FIXED.size + len(header)) - _FIXED.size - len(header))
    size = _FIXED.size + len(header) + offset + _DIGEST_BYTES
    partial, seal = path.with_name(path.name + ".partial"), hashlib.sha256()
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("wb") as file:
        head = _FIXED.pack(_MAGIC, _VERSION, len(header), size) + header
        for data in (head, *(part.tobytes() for part in sections.values())):
            for piece in (data, bytes(_padded(len(data)) - len(data))):
                file.write(piece)
                seal.update(piece)
        file.write(seal.digest())
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load(path: Path) -> TrieIndex:
    """Map the file that `save` wrote, once its content is verified.

    Raises:
        DataError: it is missing, no such file, of another version, truncated or corrupted.
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
    # Copy-on-write, because torch has no tensors that must not be written; nothing writes.
    content = np.memmap(path, dtype=np.uint8, mode="c")
    digest = hashlib.sha256(content[:-_DIGEST_BYTES].data).digest()
    if digest != content[-_DIGEST_BYTES:].tobytes():
        raise DataError(
            f"trie file {path} is corrupted: its SHA-256 starts with {digest.hex()[:12]} instead "
            f"of {content[-_DIGEST_BYTES:].tobytes().hex()[:12]}; build it again from the items "
            "file"
        )
    body = _FIXED.size + length
    facts = json.loads(content[_FIXED.size : body].tobytes())
    part = {
        name: np.frombuffer(content, dtype=kind, count=count, offset=body + offset)
        for name, (kind, offset, count) in facts["sections"].items()
    }
    return TrieIndex(
        trie=Trie(
            **{name: torch.from_numpy(part[name]) for name in _TRIE},
            catalog=facts["catalogue"],
        ),
        **{name: part[name] for name in _ITEMS},
    )


def _sections(index: TrieIndex) -> dict[str, Int[np.ndarray, " _"]]:
    trie = {name: np.ascontiguousarray(getattr(index.trie, name).cpu().numpy()) for name in _TRIE}
    return trie | {name: np.ascontiguousarray(getattr(index, name)) for name in _ITEMS}


def _padded(num_bytes: int) -> int:
    """The next multiple of the alignment."""
    return -(-num_bytes // _ALIGN) * _ALIGN
