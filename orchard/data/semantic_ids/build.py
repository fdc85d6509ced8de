"""Semantic IDs for the items of a data-set folder, written into it whole or not at all.

Shapes:  I items   L levels
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial as bound
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Float64

from orchard import ragged
from orchard.catalog import embeddings
from orchard.data.semantic_ids import embed
from orchard.data.semantic_ids.collisions import POLICIES, ResolvedCodes
from orchard.data.semantic_ids.measure import CodeQuality, draw, measure_codes
from orchard.data.semantic_ids.quantize import Quantized, quantize
from orchard.data.semantic_ids.rqvae import quantize_learned
from orchard.errors import ConfigError, DataError
from orchard.parquet import read_table

REPORT, PICTURE, EMBEDDINGS = "sids.json", "sids.png", "embeddings.parquet"
MAX_LEVELS = 8
Source = Literal["auto", "titles", "interactions"]
QUANTIZERS: Mapping[str, Callable[..., Quantized]] = {
    "kmeans": quantize,
    "balanced": bound(quantize, balanced=True),
    "rqvae": quantize_learned,
}
"""Each takes embeddings, the sizes of the codebooks and a `seed`."""


@dataclass(frozen=True, kw_only=True)
class SemanticIdConfig:
    """How to make them."""

    levels: tuple[int, ...] = (256, 256, 256)
    """Codebook size of each level."""
    quantiser: str = "kmeans"
    """One of `QUANTISERS`."""
    collisions: str = "reassign"
    """One of `collisions.POLICIES`."""
    source: Source = "auto"
    """`auto`: titles where every item has one, else interactions."""
    model: Path | None = None
    """Folder of a sentence-transformers model for the titles; TF-IDF without it."""
    embeddings: Path | None = None
    """A file of embeddings, instead of all that."""
    dimensions: int = 128
    """Of embeddings made here."""
    seed: int = 0


class SemanticIdReport(TypedDict):
    """What `build` writes as `sids.json`."""

    recipe: dict[str, Any]
    embedding: str
    """Where the embeddings came from."""
    residual: list[float]
    """Share of the embeddings' variance that is left after each level."""
    before: CodeQuality
    """Of the codes as quantised."""
    after: CodeQuality
    """Of the semantic IDs, collisions settled."""


def build(folder: Path, recipe: SemanticIdConfig, *, overwrite: bool = False) -> SemanticIdReport:
    """Give the items of a data set their semantic IDs, and leave a report, a picture, embeddings.

    Raises:
        ConfigError: an unknown policy or quantiser, or codebook sizes that make no sense.
        DataError: no items, items that have semantic IDs already, or as `embed` and `quantise`.
    """
    if recipe.collisions not in POLICIES:
        raise ConfigError(
            f"--collisions = {recipe.collisions!r}; choose from {', '.join(POLICIES)}"
        )
    if recipe.quantiser not in QUANTIZERS:
        raise ConfigError(
            f"--quantiser = {recipe.quantiser!r}; choose from {', '.join(QUANTIZERS)}"
        )
    if not recipe.levels or min(recipe.levels) < 2:
        raise ConfigError(f"--levels = {recipe.levels}; each codebook needs at least 2 codes")
    if len(recipe.levels) > MAX_LEVELS:
        raise ConfigError(
            f"--levels has {len(recipe.levels)} codebooks, at most {MAX_LEVELS} make sense: every "
            "level is a forward pass of each search; use fewer and larger ones"
        )
    path = folder / "items.parquet"
    items = read_table(path, role="items", columns=("item_id",), remedy="the data folder")
    if "sid" in items.column_names and not overwrite:
        raise DataError(f"the items of {path} have semantic IDs; pass --overwrite to replace them")
    embedding, origin = _embedding(folder, items, recipe)
    made = QUANTIZERS[recipe.quantiser](embedding, recipe.levels, seed=recipe.seed)
    settled = POLICIES[recipe.collisions](made, _popularity(folder, items))
    report = SemanticIdReport(
        recipe={
            "levels": list(recipe.levels),
            "quantiser": recipe.quantiser,
            "collisions": recipe.collisions,
            "dimensions": embedding.shape[1],
            "seed": recipe.seed,
        },
        embedding=origin,
        residual=made.error.tolist(),
        before=measure_codes(made.codes),
        after=measure_codes(settled.codes),
    )
    _write(folder, items, settled, embedding, report)
    return report


def _embedding(
    folder: Path, items: Any, recipe: SemanticIdConfig
) -> tuple[Float32[np.ndarray, "I E"], str]:
    ids = items["item_id"].to_numpy().astype(np.int64)
    if recipe.embeddings is not None:
        return embeddings.read(
            recipe.embeddings, ids, remedy="--embeddings"
        ), recipe.embeddings.name
    title = [""] * len(ids)
    if "title" in items.column_names:
        title = [text or "" for text in items["title"].to_pylist()]
    if recipe.model is not None:
        return embed.of_model(title, recipe.model), f"titles, {recipe.model.name}"
    size = {"dimensions": recipe.dimensions, "seed": recipe.seed}
    if recipe.source == "titles" or (recipe.source == "auto" and all(t.strip() for t in title)):
        return embed.of_titles(title, **size), "titles, TF-IDF and SVD"
    rows = read_table(
        folder / "train.parquet", role="train", columns=("history", "target"), remedy="the folder"
    )
    order = np.argsort(ids, kind="stable")
    history = rows["history"].combine_chunks()
    start = ragged.starts(history.value_lengths().to_numpy())
    known = [
        order[np.searchsorted(ids, part, sorter=order).clip(max=len(ids) - 1)]
        for part in (history.flatten().to_numpy(), rows["target"].to_numpy())
    ]
    made = embed.of_interactions(known[0], start, known[1], num_items=len(ids), **size)
    return made, "interactions, PPMI and SVD"


def _popularity(folder: Path, items: Any) -> Float64[np.ndarray, " I"]:
    """How often each item is a target in train; the prior that orders items of equal codes."""
    path = folder / "train.parquet"
    ids = items["item_id"].to_numpy().astype(np.int64)
    if not path.is_file():
        return np.zeros(len(ids))
    target = pq.read_table(path, columns=["target"])["target"].to_numpy()
    found, count = np.unique(target, return_counts=True)
    place = np.searchsorted(found, ids).clip(max=len(found) - 1)
    return np.where(found[place] == ids, count[place], 0).astype(np.float64)


def _write(
    folder: Path,
    items: Any,
    settled: ResolvedCodes,
    embedding: Float32[np.ndarray, "I E"],
    report: SemanticIdReport,
) -> None:
    """All files beside their places first, then into them, the items last."""
    text = [
        "".join(f"<{chr(97 + level)}_{code}>" for level, code in enumerate(codes))
        for codes in settled.codes.tolist()
    ]
    table = items.drop_columns([n for n in ("sid", "sid_text") if n in items.column_names])
    sids = pa.array(settled.codes.tolist(), pa.list_(pa.int32()))
    table = table.append_column("sid", sids).append_column("sid_text", pa.array(text))
    flat = pa.array(embedding.reshape(-1))
    lists = pa.FixedSizeListArray.from_arrays(flat, embedding.shape[1]).cast(pa.list_(pa.float32()))
    vectors = pa.table({"item_id": items["item_id"], "embedding": lists})
    partial = {n: folder / f".{n}.partial" for n in (PICTURE, EMBEDDINGS, REPORT, "items.parquet")}
    try:
        draw(settled.codes, report["residual"], partial[PICTURE])
        pq.write_table(vectors, partial[EMBEDDINGS], compression="zstd")
        partial[REPORT].write_text(json.dumps(report, indent=2) + "\n")
        pq.write_table(table.take(settled.order), partial["items.parquet"], compression="zstd")
        for name, path in partial.items():
            path.replace(folder / name)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
