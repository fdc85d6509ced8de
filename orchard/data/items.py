"""Read the items of a data set, and the tokenizer bundle that their semantic IDs come from."""

from transformers import PreTrainedTokenizerBase

from orchard.catalog import catalog as catalogs
from orchard.catalog.catalog import Catalog
from orchard.errors import ConfigError
from orchard.policy import titles
from orchard.semantic_ids import bundle as bundles
from orchard.semantic_ids.bundle import BUNDLE, Bundle
from orchard.settings import DataConfig


def read_items(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[Catalog, Bundle | None]:
    """Load the items as semantic IDs with their bundle, or as titles in the policy's tokens.

    Where there is a bundle, the levels have its sizes, so that every code that it may give to a new
    item has a token.

    Args:
        data: settings of the data.
        tokenizer: tokenizer of the policy; None for one that is still to be made.

    Raises:
        ConfigError: the items are titles, and there is no tokenizer.
        CatalogError: the bundle is of another catalog, or as `orchard.catalog.catalog.read`.
        DataError: a bundle that the settings name does not exist, or a file of it is damaged.
    """
    path = data.path / data.items
    if data.titles:
        if tokenizer is None:
            raise ConfigError(
                "data.titles = true needs a policy whose tokens the titles are written in; "
                "set model.path to its folder, or data.title_tokens for a policy from scratch",
                code="config.no_title_tokens",
            )
        return titles.read(path, tokenizer), None
    catalog = catalogs.read(path, level_size=data.level_size, varying_depth=data.varying_depth)
    if (bundle := read_bundle(data)) is None:
        return catalog, None
    bundle.check_catalog(
        catalog,
        remedy="use the items file that `orchard data sids` or `orchard data encode` wrote with "
        'it, or set data.bundle = "" to leave the bundle out',
    )
    wanted = bundle.description.level_size
    if data.level_size is None and catalog.level_size != wanted:
        catalog = catalogs.read(path, level_size=wanted)
    return catalog, bundle


def read_bundle(data: DataConfig) -> Bundle | None:
    """Open the tokenizer bundle of a data set; None where there is none, or none is wanted.

    Raises:
        DataError: a bundle that the settings name does not exist, or a file of it is damaged.
    """
    folder = data.path / data.bundle
    is_absent = data.bundle == BUNDLE and not bundles.versions(folder)
    return None if is_absent or not data.bundle else Bundle.open(folder)
