"""Assembly of responses from ranked items."""

from typing import Any

from serve.catalog.store import CatalogVersion
from serve.decoding.recommender import RankedItems
from serve.decoding.request import RANDOM, ResolvedRequest
from serve.schema import Decoder, RecommendResponse


def build_response(
    resolved: ResolvedRequest,
    ranked: RankedItems,
    catalog_version: CatalogVersion,
    decoder: Decoder,
    **fields: Any,
) -> RecommendResponse:
    """Build a response without validation, which would cost more than building it.

    Args:
        resolved: resolved request.
        ranked: ranked items.
        catalog_version: catalog version of the items.
        decoder: decoder that answered.
        **fields: remaining fields of the response.
    """
    return RecommendResponse.model_construct(
        items=ranked.items, returned=len(ranked.items), requested=resolved.request.k,
        shortfall_reason=ranked.shortfall_reason, variant=resolved.variant,
        catalog=catalog_version.name, decoder=decoder, proved=ranked.proved,
        seed=resolved.seed if decoder in RANDOM else None,
        unknown_items=ranked.unknown_items, tree=None, **fields,
    )  # fmt: skip
