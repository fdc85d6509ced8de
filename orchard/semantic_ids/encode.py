"""Give the items of a file the semantic IDs of a tokenizer bundle, and append the new ones to it.

Shapes:  I items   N new items   E dimensions   M levels of the semantic IDs
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Bool, Float32, Int64

from orchard.catalog import embeddings
from orchard.errors import ConfigError, DataError
from orchard.folders import atomic_file
from orchard.parquet import read_table
from orchard.semantic_ids import assign, bundle, embed
from orchard.semantic_ids.assign import Assigned
from orchard.semantic_ids.bundle import Bundle
from orchard.semantic_ids.item_table import ItemTable, sid_column, sid_text_column
from orchard.semantic_ids.measure import CodeQuality, measure_codes


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """Options of encoding items with a bundle."""

    embeddings: Path | None = None
    """File of embeddings of the new items, for a bundle that was made from embeddings."""
    model: Path | None = None
    """Folder of the sentence-transformers model that the bundle was made with."""
    append: bool = False
    """Write the next version of the bundle with the new items."""
    share_when_full: bool = False
    """Let an item share a semantic ID where no code is free below its prefix."""
    verify: bool = False
    """Assign the items that the bundle was made from anew, and compare."""


@dataclass(frozen=True, kw_only=True)
class EncodeReport:
    """Result of encoding the items of a file."""

    version: int
    """Version of the bundle that has the items; without `append`, the one that was read."""
    num_known: int
    """Number of items that the bundle had, which keep their semantic IDs."""
    num_new: int
    num_moved: int
    """Number of new items whose nearest code was taken, and which have another."""
    num_silent: int
    """Number of new items whose embedding carries no information."""
    num_shared: int
    """Number of new items that share a semantic ID because none was free."""
    distance: float
    """Mean squared distance of the new items to their last code, over that of the first items."""
    num_first: int
    """Number of items that the bundle was made from."""
    num_repeated: int | None
    """Number of these that get the same semantic ID again; None without `verify`."""


def encode(folder: Path, items_path: Path, out: Path, options: EncodeOptions) -> EncodeReport:
    """Write the items of a file with their semantic IDs, and append new ones to the bundle.

    Args:
        folder: the bundle.
        items_path: items file; the items may be all of a catalog or only new ones.
        out: Parquet file to write.
        options: where embeddings come from, and what to do with new items.

    Raises:
        ConfigError: an option does not fit the bundle.
        DataError: a file cannot be read, the items have semantic IDs of another bundle, a new item
            has no title or embedding, no code is free, or another append came first.
    """
    known = Bundle.open(folder)
    items = read_table(items_path, role="items", columns=("item_id",), remedy="ITEMS")
    ids = items["item_id"].to_numpy().astype(np.int64)
    if len(np.unique(ids)) != len(ids):
        values, count = np.unique(ids, return_counts=True)
        raise DataError(
            f"item {values[np.argmax(count)]} is in {items_path} several times; keep one"
        )
    row, is_known = known.table.lookup(ids)
    check_same_bundle(known, items, ids, row, is_known, items_path)
    assigned = None
    if not is_known.all():
        fresh = items.filter(~is_known)
        vectors = _vectors(known, fresh, options, items_path)
        assigned = assign.assign(
            known, ids[~is_known], vectors, share_when_full=options.share_when_full
        )
    num_repeated = _verify(known, items, ids, options, items_path) if options.verify else None
    sid = np.empty((len(ids), known.table.sid.shape[1]), dtype=np.int64)
    sid[is_known] = known.table.sid[row[is_known]]
    version = known.version
    if assigned is not None:
        sid[~is_known] = assigned.items.sid
        if options.append:
            version = bundle.append(known, assigned.items, _quality(known, assigned)).version
    table = items.drop_columns([n for n in ("sid", "sid_text") if n in items.column_names])
    table = table.append_column("sid", sid_column(sid))
    with atomic_file(out) as partial:
        pq.write_table(
            table.append_column("sid_text", sid_text_column(sid)), partial, compression="zstd"
        )
    return EncodeReport(
        version=version,
        num_known=int(is_known.sum()),
        num_new=int((~is_known).sum()),
        num_moved=int(assigned.is_moved.sum()) if assigned else 0,
        num_silent=int(assigned.is_silent.sum()) if assigned else 0,
        num_shared=int(assigned.is_shared.sum()) if assigned else 0,
        distance=_relative_distance(known, assigned.items) if assigned else 1.0,
        num_first=int((known.table.version == 1).sum()),
        num_repeated=num_repeated,
    )


def check_same_bundle(
    known: Bundle,
    items: Any,
    ids: Int64[np.ndarray, " I"],
    row: Int64[np.ndarray, " I"],
    is_known: Bool[np.ndarray, " I"],
    path: Path,
) -> None:
    """Raise DataError if items have semantic IDs that a bundle did not give them.

    Args:
        known: the bundle.
        items: table of the items, with a column `sid` or without.
        ids: identifiers of the items.
        row: row of each item in the bundle.
        is_known: whether the bundle has the item.
        path: file of the items, for messages.
    """
    if "sid" not in items.column_names:
        return
    own = sid_column(known.table.sid[row]).to_pylist()
    for place, sid in enumerate(items["sid"].to_pylist()):
        if sid is None or (is_known[place] and sid == own[place]):
            continue
        given = own[place] if is_known[place] else "none"
        raise DataError(
            f"item {ids[place]} has semantic ID {sid} in {path} and {given} in the bundle "
            f"{known.folder}, which is another catalog's; give the bundle of these items, or drop "
            "their column `sid`"
        )


def _vectors(
    known: Bundle, items: Any, options: EncodeOptions, path: Path
) -> Float32[np.ndarray, "N E"]:
    """Embed items as a bundle does."""
    description = known.description
    if options.embeddings is not None and description.source in ("titles", "model"):
        raise ConfigError(
            f"--embeddings is given, but the bundle {known.folder} embeds titles itself "
            f"({description.origin}); leave it out"
        )
    if options.model is not None and description.source != "model":
        raise ConfigError(
            f"--model is given, but the bundle {known.folder} was made without one "
            f"({description.origin}); leave it out"
        )
    ids = items["item_id"].to_numpy().astype(np.int64)
    if description.source in ("titles", "model"):
        title = titles_of(items)
        untitled = [row for row, text in enumerate(title) if not text.strip()]
        if untitled:
            raise DataError(
                f"item {ids[untitled[0]]} of {path} has no title ({len(untitled)} of {len(title)} "
                "items to embed), from which the bundle makes semantic IDs; add it"
            )
        if known.titles is not None:
            return known.titles.embed(title)
        return embed.of_model(title, _encoder_folder(known, options))
    if options.embeddings is None:
        raise ConfigError(
            f"the bundle {known.folder} was made from {description.origin}, and cannot embed an "
            "item by itself; pass --embeddings with vectors of the same kind"
        )
    vectors = embeddings.read(options.embeddings, ids, remedy="--embeddings")
    assign.check_width(known, vectors)
    return vectors


def _encoder_folder(known: Bundle, options: EncodeOptions) -> Path:
    """Return the folder of the encoder that a bundle was made with."""
    description = known.description
    if options.model is None:
        raise ConfigError(
            f"the bundle {known.folder} embeds titles by the encoder {description.model}; pass "
            "--model with its folder"
        )
    if (digest := bundle.digest_of_folder(options.model)) != description.model_digest:
        raise ConfigError(
            f"--model {options.model} has digest {digest[:12]}, the bundle was made with "
            f"{description.model}, {description.model_digest[:12]}; give that folder, unchanged"
        )
    return options.model


def titles_of(items: Any) -> list[str]:
    """Return the titles of a table of items, empty where there is none."""
    if "title" not in items.column_names:
        return [""] * len(items)
    return [str(text or "") for text in items["title"].to_pylist()]


def _verify(
    known: Bundle, items: Any, ids: Int64[np.ndarray, " I"], options: EncodeOptions, path: Path
) -> int:
    """Assign the items of version 1 anew; return how many get the same semantic ID."""
    first = known.table.take(known.table.version == 1)
    order = np.argsort(ids, kind="stable")
    place = order[np.searchsorted(ids, first.item_id, sorter=order).clip(max=len(ids) - 1)]
    missing = np.flatnonzero(ids[place] != first.item_id)
    if len(missing):
        raise DataError(
            f"--verify needs all {len(first)} items that the bundle was made from; {path} lacks "
            f"item {first.item_id[missing[0]]} ({len(missing)} such items)"
        )
    again = assign.repeat(known, _vectors(known, items.take(place), options, path))
    return int((again == first.sid).all(axis=1).sum())


def _relative_distance(known: Bundle, added: ItemTable) -> float:
    """Return the mean distance of new items to their code over that of the first items."""
    before = float(known.table.distance[known.table.version == 1].mean())
    return float(added.distance.mean()) / before if before > 0 else 1.0


def _quality(known: Bundle, assigned: Assigned) -> dict[str, Any]:
    """Return the report of a version: what it added, and the quality of all semantic IDs."""
    added = assigned.items
    quality: CodeQuality = measure_codes(np.concatenate([known.table.sid, added.sid]))
    return {
        "added": {
            "items": len(added),
            "moved_to_a_free_code": int(assigned.is_moved.sum()),
            "without_signal": int(assigned.is_silent.sum()),
            "shared_for_want_of_a_free_code": int(assigned.is_shared.sum()),
            "relative_distance": _relative_distance(known, added),
        },
        "quality": quality,
    }
