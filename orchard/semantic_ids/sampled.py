"""Build semantic IDs of a large catalog: codebooks of a sample, items shard by shard.

Shapes:  I items
"""

from pathlib import Path

import numpy as np

from orchard.catalog import embeddings
from orchard.errors import ConfigError, DataError
from orchard.semantic_ids import build, bundle, large
from orchard.semantic_ids.build import SemanticIdConfig, SemanticIdReport
from orchard.semantic_ids.collisions import ResolvedCodes
from orchard.semantic_ids.item_table import ItemTable
from orchard.semantic_ids.measure import measure_codes

WORK = ".sids.work"
"""Folder in the data set with the parts of an unfinished build."""


def build_sampled(
    folder: Path, recipe: SemanticIdConfig, *, overwrite: bool = False
) -> SemanticIdReport:
    """Write semantic IDs as `build.build` does, with memory for the codes alone.

    An interrupted build goes on from its last shard when it is run again. The embeddings are not
    copied beside the items, whose order stays.

    Raises:
        ConfigError: options do not allow it, or as `build.build`.
        DataError: as `build.build`.
    """
    build.check_recipe(recipe)
    if recipe.sample is None or recipe.embeddings is None:
        raise ConfigError("--sample needs --embeddings with an .npy file of rows to read in parts")
    for option, value in (("quantiser", recipe.quantiser), ("collisions", recipe.collisions)):
        if value in ("balanced", "keep"):
            raise ConfigError(
                f"--{option} {value} needs all items at once and does not work with "
                "--sample; choose another, or leave --sample out"
            )
    items = build.read_items(folder, overwrite=overwrite)
    ids = items["item_id"].to_numpy().astype(np.int64)
    if not embeddings.is_in_first_order(folder / "items.parquet", ids):
        raise DataError(
            f"the items of {folder} were put in another order when their semantic IDs were made, "
            f"which the rows of {recipe.embeddings} do not follow; import the data set again"
        )
    rows = large.open_rows(recipe.embeddings, len(items))
    prior = build.popularity(folder, items)
    coded = large.encode_large(
        rows,
        build.QUANTIZERS[recipe.quantiser],
        recipe,
        prior,
        folder / WORK,
        where=str(recipe.embeddings),
    )
    is_positive = coded.length > 0
    least = float(0.1 * np.median(coded.length[is_positive])) if is_positive.any() else 0.0
    silent = coded.length <= least
    build.check_signal(silent, items, recipe, recipe.embeddings.name)
    report = SemanticIdReport(
        recipe={
            "levels": list(recipe.levels),
            "quantiser": recipe.quantiser,
            "collisions": recipe.collisions,
            "dimensions": rows.shape[1],
            "seed": recipe.seed,
            "sample": recipe.sample,
        },
        embedding=recipe.embeddings.name,
        items_without_signal=int(silent.sum()),
        items_sharing_an_embedding=None,
        residual=coded.fitted.error.tolist(),
        before=measure_codes(coded.quantized),
        after=measure_codes(coded.sid),
    )
    table = ItemTable(
        item_id=ids,
        quantized=coded.quantized,
        sid=coded.sid,
        prior=prior,
        distance=coded.distance,
        nearest=coded.nearest,
        version=np.ones(len(items), dtype=np.int64),
    )
    description = build.describe(
        recipe, table, "given", recipe.embeddings.name, rows.shape[1], least
    )
    fitted = coded.fitted
    bundle.write(
        folder / bundle.BUNDLE, description, fitted.projection, fitted.codebook, table, report
    )
    resolved = ResolvedCodes(codes=coded.sid, order=np.arange(len(items)))
    build.write_items(folder, items, resolved, report, None)
    large.remove_work(folder / WORK)
    return report
