"""Request resolution: defaults, limits, batch key and cache key."""

import hashlib
import itertools
import secrets
from dataclasses import dataclass, field

import numpy as np

from orchard.settings import ServeConfig
from serve.catalog.store import CatalogVersion
from serve.decoding.recommender import BatchKey, Query
from serve.errors import UnprocessableError
from serve.schema import RecommendRequest

_NUMBERS = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ResolvedRequest:
    """Request with its variant, history and defaults."""

    request: RecommendRequest
    history: list[int]
    variant: str
    width: int
    """Requested beam width; a deadline may narrow it."""
    seed: int
    levels: bool
    """Whether per-level log-probabilities are needed."""
    number: int = field(default_factory=_NUMBERS.__next__)
    """Process-wide unique number."""


def resolve(
    request: RecommendRequest,
    history: list[int],
    variant: str,
    config: ServeConfig,
    *,
    guided: bool,
) -> ResolvedRequest:
    """Apply defaults to a request and check it against the configured limits.

    Args:
        request: validated request body.
        history: item ids of the request or of its user.
        variant: name of the variant that answers.
        config: limits and defaults.
        guided: whether the variant supports value-guided search.

    Raises:
        UnprocessableError: the request exceeds a limit, or names an unknown filter or an
            unsupported decoder.
    """
    if request.k > config.max_k:
        raise UnprocessableError(f"k = {request.k} exceeds {config.max_k}; ask for fewer items")
    width = request.width or max(config.width, request.k)
    if width > config.max_width:
        raise UnprocessableError(
            f"width = {width} exceeds {config.max_width}; ask for a narrower beam"
        )
    if request.decoder == "ved" and not guided:
        raise UnprocessableError(
            "decoder ved needs a policy with a value head in the torch engine, which variant "
            f"{variant} has not; choose beam or beam_sample"
        )
    unknown = sorted(set(request.filters) - config.filters.keys())
    if unknown:
        raise UnprocessableError(
            f"there is no filter {unknown[0]!r}; "
            f"known: {', '.join(sorted(config.filters)) or 'none'}"
        )
    return ResolvedRequest(
        request=request,
        history=history,
        variant=variant,
        width=width,
        seed=secrets.randbits(62) if request.seed is None else request.seed,
        levels=request.explain != "none" or config.exposure is not None,
    )


def batch_key(resolved: ResolvedRequest, width: int) -> BatchKey:
    """Return the search parameters that all requests of a batch must share."""
    request = resolved.request
    return BatchKey(
        decoder=request.decoder,
        width=width,
        filters=tuple(sorted(set(request.filters))),
        temperature=request.temperature if request.decoder == "beam_sample" else 1.0,
        trace=resolved.number if request.explain == "tree" else None,
    )


def query_of(resolved: ResolvedRequest) -> Query:
    """Return the part of a request that is specific to it within a batch."""
    request = resolved.request
    excluded = [*request.exclude, *(resolved.history if request.exclude_seen else ())]
    return Query(
        history=np.array(resolved.history, dtype=np.int64),
        k=request.k,
        exclude=np.array(excluded, dtype=np.int64),
        per_prefix=request.per_prefix,
        seed=resolved.seed,
        levels=resolved.levels,
    )


def cache_key(
    resolved: ResolvedRequest, policy: str, catalog_version: CatalogVersion
) -> tuple[object, ...] | None:
    """Return everything the answer depends on; None if the answer must not be cached."""
    request = resolved.request
    if request.explain == "tree" or (request.decoder != "beam" and request.seed is None):
        return None
    normalized = request.model_copy(update={"user": None, "deadline_ms": None, "history": []})
    # A digest: histories and exclusions may hold thousands of items.
    content = f"{resolved.history}{normalized.model_dump_json()}".encode()
    return (
        resolved.variant,
        policy,
        catalog_version.version,
        hashlib.blake2b(content, digest_size=16).digest(),
    )
