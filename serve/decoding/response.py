"""Assembly of responses from ranked items."""

from typing import Any

from serve.catalog.store import CatalogVersion
from serve.decoding.recommender import RankedItems
from serve.decoding.request import RANDOM, ResolvedRequest
from serve.decoding.scheduler import DecodeResult
from serve.decoding.scoring import ScoredItems
from serve.schema import Cost, Decoder, RecommendResponse, ScoreResponse


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


def build_search_response(resolved: ResolvedRequest, result: DecodeResult) -> RecommendResponse:
    """Build the response of a search, without its tree."""
    cost = result.candidates.cost
    return build_response(
        resolved, result.ranked, result.catalog_version, result.decoder,
        policy=result.policy, source="policy", fallback="", width=result.width,
        cost=Cost(
            prefill_tokens=cost.prefill_tokens, forward_tokens=cost.forward_tokens,
            passes=cost.passes, batch=result.batch, seconds=result.seconds,
        ),
    )  # fmt: skip


def build_score_response(scored: ScoredItems, variant: str, seconds: float) -> ScoreResponse:
    """Build the response with the scores of given items, without validation."""
    cost = scored.candidates.cost
    return ScoreResponse.model_construct(
        items=scored.items, variant=variant, policy=scored.policy, catalog=scored.catalog,
        unknown_items=scored.unknown_items,
        cost=Cost(
            prefill_tokens=cost.prefill_tokens, forward_tokens=cost.forward_tokens,
            passes=cost.passes, batch=1, seconds=seconds,
        ),
    )  # fmt: skip
