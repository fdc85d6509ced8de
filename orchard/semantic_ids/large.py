"""Make semantic IDs of more items than fit into memory with their embeddings.

The codebooks are fitted to a sample, and the items are encoded shard by shard from a mapped file.
A shard's codes are written once, so that an interrupted build goes on where it was. Collisions are
settled in the order of prefixes; the embeddings of colliding items alone are sorted, on disk.

Shapes:  I items   E dimensions of an embedding   D of the codebooks   L levels   S items of a shard
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from jaxtyping import Bool, Float32, Float64, Int64
from safetensors.numpy import load_file, save_file

from orchard import arrays
from orchard.catalog.embeddings import check_embeddings
from orchard.errors import DataError
from orchard.folders import atomic_file, atomic_write
from orchard.semantic_ids.collisions import POLICIES, free_codes
from orchard.semantic_ids.projection import Projection
from orchard.semantic_ids.quantize import CodedItems, Quantized, residual_codes

SHARD = 1 << 16
"""Items of a shard."""
_BLOCK = 1 << 16
"""Items whose collisions are settled at once."""
_FIT, _KEY, _LAST = "fit.safetensors", "key.json", "last.bin"


@dataclass(frozen=True, kw_only=True)
class LargeCodes:
    """Codes of all items, with the codebooks that were fitted to a sample of them."""

    fitted: Quantized
    """Codes and codebooks of the sample."""
    quantized: Int64[np.ndarray, "I L"]
    sid: Int64[np.ndarray, "I M"]
    distance: Float32[np.ndarray, " I"]
    """Squared distance to the assigned code of the last codebook."""
    nearest: Float32[np.ndarray, " I"]
    """Squared distance to the code of the quantizer."""
    length: Float32[np.ndarray, " I"]
    """Euclidean length of each embedding."""


def open_rows(path: Path, num_items: int) -> Any:
    """Map the embeddings of an `.npy` file, one row per item.

    Raises:
        DataError: the file is missing, is no `.npy` file or has another number of rows.
    """
    if path.suffix != ".npy" or not path.is_file():
        raise DataError(
            f"embeddings file {path} is no .npy file, which --sample maps instead of reading; "
            "write rows in the order of the items with numpy.save"
        )
    try:
        rows: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(
            f"embeddings file {path} is not an array of numbers; write it with numpy.save"
        ) from error
    if rows.ndim != 2 or len(rows) != num_items:
        raise DataError(
            f"{path} holds embeddings of shape {rows.shape} for {num_items} items; one row per "
            "item is needed"
        )
    return rows


def encode_large(
    rows: Any,
    fit: Any,
    recipe: Any,
    prior: Float64[np.ndarray, " I"],
    work: Path,
    *,
    where: str,
) -> LargeCodes:
    """Fit codebooks to a sample of the rows, encode all of them and resolve collisions.

    Args:
        rows: embeddings of the items, an array that may be mapped from a file.
        fit: quantizer, a value of `build.QUANTIZERS`.
        recipe: options with the fields `levels`, `collisions`, `sample` and `seed`.
        prior: number that orders items which an extra level counts.
        work: folder for the parts of an unfinished build; a build with the same `recipe` and rows
            goes on from them.
        where: file of the rows, for messages.

    Raises:
        DataError: an embedding is not finite, or as the quantizer.
    """
    _begin(work, rows, recipe, where)
    fitted = _fit(rows, fit, recipe, work, where)
    parts = [
        _encode_shard(rows, start, stop, fitted, work, where) for start, stop in _shards(len(rows))
    ]
    quantized = np.concatenate([part["codes"] for part in parts]).astype(np.int64)
    nearest = np.concatenate([part["nearest"] for part in parts])
    length = np.concatenate([part["length"] for part in parts])
    if recipe.collisions == "reassign":
        sid, distance = _reassign(rows, quantized, nearest, fitted, work, where)
    else:
        no_residuals = np.broadcast_to(
            np.zeros(1, dtype=np.float32), (len(rows), fitted.codebook[-1].shape[1])
        )
        coded = CodedItems(codes=quantized, codebook=fitted.codebook, last=no_residuals)
        sid, distance = POLICIES[recipe.collisions](coded, prior).codes, nearest
    return LargeCodes(
        fitted=fitted,
        quantized=quantized,
        sid=sid,
        distance=distance,
        nearest=nearest,
        length=length,
    )


def remove_work(work: Path) -> None:
    """Remove the parts of a build that is finished."""
    shutil.rmtree(work, ignore_errors=True)


def _shards(num_items: int) -> Iterator[tuple[int, int]]:
    """Yield the first row of each shard, and the one behind its last."""
    for start in range(0, num_items, SHARD):
        yield start, min(start + SHARD, num_items)


def _begin(work: Path, rows: Any, recipe: Any, where: str) -> None:
    """Empty the folder of parts, unless they are of the same recipe and rows."""
    ends = b"".join(np.ascontiguousarray(rows[row]).tobytes() for row in (0, len(rows) // 2, -1))
    key = json.dumps(
        {
            "recipe": repr(recipe),
            "shape": list(rows.shape),
            "type": str(rows.dtype),
            "changed": Path(where).stat().st_mtime_ns if Path(where).is_file() else 0,
            "rows": blake3(ends).hexdigest(),
            "shard": SHARD,
        }
    )
    path = work / _KEY
    if not path.is_file() or path.read_text() != key:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        atomic_write(path, key)


def _fit(rows: Any, fit: Any, recipe: Any, work: Path, where: str) -> Quantized:
    """Fit the codebooks to a sample, or read them where a build before did."""
    path = work / _FIT
    if not path.is_file():
        draw = np.random.default_rng(recipe.seed)
        sample = np.sort(draw.choice(len(rows), min(recipe.sample, len(rows)), replace=False))
        vectors = check_embeddings(np.asarray(rows[sample]), len(sample), where=where)
        found: Quantized = fit(vectors, recipe.levels, seed=recipe.seed)
        arrays = {**found.projection.arrays(), "codes": found.codes, "error": found.error}
        arrays |= {f"book.{level}": book for level, book in enumerate(found.codebook)}
        with atomic_file(path) as partial:
            save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, partial)
    arrays = load_file(path)
    books = tuple(arrays[f"book.{level}"] for level in range(len(recipe.levels)))
    return Quantized(
        codes=arrays["codes"],
        codebook=books,
        error=arrays["error"],
        last=np.zeros((len(arrays["codes"]), books[0].shape[1]), dtype=np.float32),
        projection=Projection.from_arrays(arrays),
    )


def _encode_shard(
    rows: Any, start: int, stop: int, fitted: Quantized, work: Path, where: str
) -> dict[str, np.ndarray]:
    """Encode the rows of a shard, or read them where a build before did."""
    path = work / f"shard-{start:012d}.safetensors"
    if not path.is_file():
        vectors = _rows(rows, start, stop, where)
        codes, last = residual_codes(fitted.projection(vectors), fitted.codebook)
        difference = last - fitted.codebook[-1][codes[:, -1]]
        part: dict[str, np.ndarray] = {
            "codes": codes.astype(np.int32),
            "nearest": np.einsum("sd,sd->s", difference, difference),
            "length": np.sqrt(np.einsum("se,se->s", vectors, vectors)),
        }
        with atomic_file(path) as partial:
            save_file(part, partial)
    return load_file(path)


def _rows(rows: Any, start: int, stop: int, where: str) -> Float32[np.ndarray, "S E"]:
    """Read and check the rows of a shard."""
    try:
        return check_embeddings(np.asarray(rows[start:stop]), stop - start, where=where)
    except DataError as error:
        raise DataError(f"in the shard from row {start} on: {error}") from error


def _reassign(
    rows: Any,
    quantized: Int64[np.ndarray, "I L"],
    nearest: Float32[np.ndarray, " I"],
    fitted: Quantized,
    work: Path,
    where: str,
) -> tuple[Int64[np.ndarray, "I L"], Float32[np.ndarray, " I"]]:
    """Give colliding items free codes as `collisions.reassign` does, with the same result."""
    # Rows in the order of their codes; equal ones are neighbors.
    key = arrays.row_keys(quantized)
    order = np.argsort(key, kind="stable")
    is_equal = np.diff(key[order]) == 0
    is_colliding = np.zeros(len(order), dtype=bool)
    is_colliding[order[1:][is_equal]] = is_colliding[order[:-1][is_equal]] = True
    del key, is_equal
    sid, distance = quantized.copy(), nearest.copy()
    if not is_colliding.any():
        return sid, distance
    last = _sorted_residuals(rows, quantized, order, is_colliding, fitted, work, where)
    num_before = 0
    for block in _blocks(quantized, order):
        movers = np.sort(block[is_colliding[block]])
        if len(movers) == 0:
            continue
        # The residuals of the block lie together, in the order of codes: bring them into row order.
        in_order = block[is_colliding[block]]
        residual = np.asarray(last[num_before : num_before + len(movers)])
        residual = residual[np.argsort(in_order, kind="stable")]
        num_before += len(movers)
        coded = CodedItems(codes=quantized[movers], codebook=fitted.codebook, last=residual)
        code, _ = free_codes(coded, quantized[block[~is_colliding[block]]])
        sid[movers, -1] = code
        difference = residual - fitted.codebook[-1][code]
        distance[movers] = np.einsum("sd,sd->s", difference, difference)
    del last
    (work / _LAST).unlink()
    return sid, distance


def _sorted_residuals(
    rows: Any,
    quantized: Int64[np.ndarray, "I L"],
    order: Int64[np.ndarray, " I"],
    is_colliding: Bool[np.ndarray, " I"],
    fitted: Quantized,
    work: Path,
    where: str,
) -> Any:
    """Write the last level's input of colliding items to a mapped file, in the order of codes."""
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.cumsum(is_colliding[order]) - 1
    shape = (int(is_colliding.sum()), fitted.codebook[-1].shape[1])
    last = np.memmap(work / _LAST, dtype=np.float32, mode="w+", shape=shape)
    for start, stop in _shards(len(rows)):
        members = np.flatnonzero(is_colliding[start:stop])
        residual = fitted.projection(_rows(rows, start, stop, where))[members]
        members += start
        for level, book in enumerate(fitted.codebook[:-1]):
            residual = residual - book[quantized[members, level]]
        last[place[members]] = residual
    return last


def _blocks(
    quantized: Int64[np.ndarray, "I L"], order: Int64[np.ndarray, " I"]
) -> Iterator[Int64[np.ndarray, " S"]]:
    """Yield rows in the order of codes, all items below a prefix together."""
    start = 0
    while start < len(order):
        stop = min(start + _BLOCK, len(order))
        if stop < len(order):  # extend the block to the end of its last prefix
            prefix = quantized[order[stop - 1], :-1]
            while stop < len(order):
                ahead = quantized[order[stop : stop + _BLOCK], :-1]
                differs = np.flatnonzero((ahead != prefix).any(axis=1))
                stop += int(differs[0]) if len(differs) else len(ahead)
                if len(differs):
                    break
        yield order[start:stop]
        start = stop
