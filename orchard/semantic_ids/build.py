"""Build semantic IDs for the items of a data-set folder and write them into it.

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
from jaxtyping import Bool, Float32, Float64

from orchard import ragged
from orchard.catalog import embeddings
from orchard.errors import ConfigError, DataError
from orchard.parquet import read_table
from orchard.semantic_ids import assign, bundle, embed
from orchard.semantic_ids.bundle import Description
from orchard.semantic_ids.collisions import POLICIES, ResolvedCodes
from orchard.semantic_ids.item_table import ItemTable, sid_column, sid_text_column
from orchard.semantic_ids.measure import CodeQuality, draw, measure_codes
from orchard.semantic_ids.quantize import Quantized, quantize
from orchard.semantic_ids.rqvae import quantize_learned
from orchard.semantic_ids.title_encoder import TitleEncoder

REPORT, PICTURE, EMBEDDINGS = "sids.json", "sids.png", embeddings.EMBEDDINGS
MAX_LEVELS = 8
Source = Literal["auto", "titles", "interactions"]
QUANTIZERS: Mapping[str, Callable[..., Quantized]] = {
    "kmeans": quantize,
    "balanced": bound(quantize, balanced=True),
    "rqvae": quantize_learned,
}
"""Quantizers by name; each takes embeddings, the sizes of the codebooks and a `seed`."""


@dataclass(frozen=True, kw_only=True)
class SemanticIdConfig:
    """Options of building semantic IDs."""

    levels: tuple[int, ...] = (256, 256, 256)
    """Codebook size of each level."""
    quantiser: str = "kmeans"
    """Name of the quantizer, a key of `QUANTIZERS`."""
    collisions: str = "reassign"
    """Name of the collision policy, a key of `collisions.POLICIES`."""
    source: Source = "auto"
    """Source of the embeddings; `auto` uses titles if every item has one, else interactions."""
    model: Path | None = None
    """Folder of a sentence-transformers model for the titles; TF-IDF without it."""
    embeddings: Path | None = None
    """File of embeddings to use instead of computing them."""
    dimensions: int = 128
    """Dimension of the computed embeddings."""
    sample: int | None = None
    """Number of items to fit the codebooks to (see `sampled.build_sampled`); all without it."""
    max_without_signal: float = 0.2
    """Largest share of items whose embedding may say nothing about them."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class _Embedded:
    """Embeddings of the items, and how they were made."""

    vectors: Float32[np.ndarray, "I E"]
    source: str
    """Source of the embeddings: titles, model, interactions or given."""
    origin: str
    """Source of the embeddings, in words."""
    titles: TitleEncoder | None = None


class SemanticIdReport(TypedDict):
    """Report of `build`, the content of `sids.json`."""

    recipe: dict[str, Any]
    """Options of the build."""
    embedding: str
    """Source of the embeddings, in words."""
    items_without_signal: int
    """Number of items whose embedding carries no information (see `embed.without_signal`)."""
    items_sharing_an_embedding: int | None
    """Number of items whose embedding is another item's, too; None where it was not counted."""
    residual: list[float]
    """Share of the embeddings' variance that remains after each level."""
    before: CodeQuality
    """Quality of the quantized codes before collisions are resolved."""
    after: CodeQuality
    """Quality of the semantic IDs, with collisions resolved."""


def build(folder: Path, recipe: SemanticIdConfig, *, overwrite: bool = False) -> SemanticIdReport:
    """Write semantic IDs into the items of a data set, with their tokenizer bundle beside them.

    A report, a plot and the embeddings are written, too.

    Raises:
        ConfigError: the policy or quantizer is unknown, or the codebook sizes are out of bounds.
        DataError: there are no items, the items have semantic IDs already, or as `embed` and
            `quantize`.
    """
    check_recipe(recipe)
    items = read_items(folder, overwrite=overwrite)
    embedded = _embed(folder, items, recipe)
    embedding, prior = embedded.vectors, popularity(folder, items)
    silent = embed.without_signal(embedding)
    check_signal(silent, items, recipe, embedded.origin)
    _, copies = np.unique(embedding, axis=0, return_counts=True)
    quantized = QUANTIZERS[recipe.quantiser](embedding, recipe.levels, seed=recipe.seed)
    resolved = POLICIES[recipe.collisions](quantized, prior)
    report = SemanticIdReport(
        recipe={
            "levels": list(recipe.levels),
            "quantiser": recipe.quantiser,
            "collisions": recipe.collisions,
            "dimensions": embedding.shape[1],
            "seed": recipe.seed,
        },
        embedding=embedded.origin,
        items_without_signal=int(silent.sum()),
        items_sharing_an_embedding=int(copies[copies > 1].sum()),
        residual=quantized.error.tolist(),
        before=measure_codes(quantized.codes),
        after=measure_codes(resolved.codes),
    )
    level = len(recipe.levels) - 1
    table = ItemTable(
        item_id=items["item_id"].to_numpy().astype(np.int64),
        quantized=quantized.codes,
        sid=resolved.codes,
        prior=prior,
        distance=assign.squared_distance(quantized, resolved.codes[:, level]),
        nearest=assign.squared_distance(quantized, quantized.codes[:, level]),
        version=np.ones(len(items), dtype=np.int64),
    )
    least = embed.least_length(embedding)
    description = describe(
        recipe, table, embedded.source, embedded.origin, embedding.shape[1], least
    )
    bundle.write(
        folder / bundle.BUNDLE,
        description,
        quantized.projection,
        quantized.codebook,
        table,
        report,
        embedded.titles,
    )
    write_items(folder, items, resolved, report, embedding)
    return report


def check_recipe(recipe: SemanticIdConfig) -> None:
    """Raise ConfigError if a name is unknown or a codebook size is out of bounds."""
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


def read_items(folder: Path, *, overwrite: bool) -> Any:
    """Read the items of a data set, in the order before they had semantic IDs.

    Raises:
        DataError: there are none, or they have semantic IDs and `overwrite` is not set.
    """
    path = folder / "items.parquet"
    items = read_table(path, role="items", columns=("item_id",), remedy="the data folder")
    if "sid" in items.column_names and not overwrite:
        raise DataError(f"the items of {path} have semantic IDs; pass --overwrite to replace them")
    return _in_first_order(items, path)


def check_signal(
    silent: Bool[np.ndarray, " I"], items: Any, recipe: SemanticIdConfig, origin: str
) -> None:
    """Raise DataError if the embeddings of too many items say nothing about them."""
    if silent.mean() > recipe.max_without_signal:
        raise DataError(
            f"the embeddings of {int(silent.sum())} of {len(silent)} items carry no information "
            f"({origin}), such as item {items['item_id'][int(np.argmax(silent))]}; at "
            f"most {recipe.max_without_signal:.0%} may: give --embeddings or --model, choose "
            "another --source, or raise --max-without-signal"
        )


def _in_first_order(items: Any, path: Path) -> Any:
    """Return the items in the order before semantic IDs were made, so that making them repeats."""
    before = embeddings.first_order(path)
    if before is None:
        return items
    ids = items["item_id"].to_numpy().astype(np.int64)
    order = np.argsort(ids, kind="stable")
    row = order[np.searchsorted(ids, before, sorter=order).clip(max=len(ids) - 1)]
    # A file whose items were changed since keeps the order that it has.
    return items.take(row) if len(row) == len(ids) and (ids[row] == before).all() else items


def _embed(folder: Path, items: Any, recipe: SemanticIdConfig) -> _Embedded:
    """Read or compute the embeddings of the items."""
    ids = items["item_id"].to_numpy().astype(np.int64)
    if recipe.embeddings is not None:
        vectors = embeddings.read(
            recipe.embeddings, ids, remedy="--embeddings", items=folder / "items.parquet"
        )
        return _Embedded(vectors=vectors, source="given", origin=recipe.embeddings.name)
    title = [""] * len(ids)
    if "title" in items.column_names:
        title = [str(text or "") for text in items["title"].to_pylist()]
    if recipe.model is not None:
        vectors = embed.of_model(title, recipe.model)
        return _Embedded(vectors=vectors, source="model", origin=f"titles, {recipe.model.name}")
    size = {"dimensions": recipe.dimensions, "seed": recipe.seed}
    if recipe.source == "titles" or (recipe.source == "auto" and all(t.strip() for t in title)):
        embed.check_titles(title)
        encoder = TitleEncoder.fit(title, **size)
        return _Embedded(
            vectors=encoder.embed(title),
            source="titles",
            origin="titles, TF-IDF and SVD",
            titles=encoder,
        )
    rows = read_table(
        folder / "train.parquet", role="train", columns=("history", "target"), remedy="the folder"
    )
    order = np.argsort(ids, kind="stable")
    history = rows["history"].combine_chunks()
    start = ragged.starts(history.value_lengths().to_numpy())
    item_rows = [
        order[np.searchsorted(ids, part, sorter=order).clip(max=len(ids) - 1)]
        for part in (history.flatten().to_numpy(), rows["target"].to_numpy())
    ]
    vectors = embed.of_interactions(item_rows[0], start, item_rows[1], num_items=len(ids), **size)
    return _Embedded(vectors=vectors, source="interactions", origin="interactions, PPMI and SVD")


def popularity(folder: Path, items: Any) -> Float64[np.ndarray, " I"]:
    """Count how often each item is a target in train: the prior that orders colliding items."""
    path = folder / "train.parquet"
    ids = items["item_id"].to_numpy().astype(np.int64)
    if not path.is_file():
        return np.zeros(len(ids))
    target = pq.read_table(path, columns=["target"])["target"].to_numpy()
    targets, count = np.unique(target, return_counts=True)
    position = np.searchsorted(targets, ids).clip(max=len(targets) - 1)
    return np.where(targets[position] == ids, count[position], 0).astype(np.float64)


def describe(
    recipe: SemanticIdConfig,
    table: ItemTable,
    source: str,
    origin: str,
    dimensions: int,
    least_length: float,
) -> Description:
    """Describe a tokenizer bundle of a recipe and its items."""
    # A level that counts colliding items has as many codes as the largest group.
    further = (table.sid[:, len(recipe.levels) :].max(axis=0) + 1).tolist()
    model = recipe.model if source == "model" else None
    return Description(
        source=source,
        origin=origin,
        dimensions=dimensions,
        least_length=least_length,
        quantiser=recipe.quantiser,
        collisions=recipe.collisions,
        level_size=(*recipe.levels, *further),
        model=model.resolve().name if model else "",
        model_digest=bundle.digest_of_folder(model) if model else "",
    )


def write_items(
    folder: Path,
    items: Any,
    resolved: ResolvedCodes,
    report: SemanticIdReport,
    embedding: Float32[np.ndarray, "I E"] | None,
) -> None:
    """Write all files under temporary names, then rename them, the items last.

    Without `embedding`, no file of embeddings is written, and one of an earlier build is removed.
    """
    table = items.drop_columns([n for n in ("sid", "sid_text") if n in items.column_names])
    table = table.append_column("sid", sid_column(resolved.codes))
    table = table.append_column("sid_text", sid_text_column(resolved.codes))
    ids = items["item_id"].to_numpy().astype(np.int64)
    if (resolved.order != np.arange(len(ids))).any():
        table = embeddings.record_order(table.take(resolved.order), ids)
    partial = {n: folder / f".{n}.partial" for n in (PICTURE, EMBEDDINGS, REPORT, "items.parquet")}
    if embedding is None:
        del partial[EMBEDDINGS]
        (folder / EMBEDDINGS).unlink(missing_ok=True)
    try:
        draw(resolved.codes, report["residual"], partial[PICTURE])
        if embedding is not None:
            # They stay in the first order of the items, which a file without identifiers has.
            flat = pa.array(embedding.reshape(-1))
            lists = pa.FixedSizeListArray.from_arrays(flat, embedding.shape[1])
            vectors = pa.table({"item_id": ids, "embedding": lists.cast(pa.list_(pa.float32()))})
            pq.write_table(vectors, partial[EMBEDDINGS], compression="zstd")
        partial[REPORT].write_text(json.dumps(report, indent=2) + "\n")
        pq.write_table(table, partial["items.parquet"], compression="zstd")
        for name, path in partial.items():
            path.replace(folder / name)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
