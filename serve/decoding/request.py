"""Request resolution: defaults, limits, batch key and cache key."""

import hashlib
import itertools
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from orchard.context import ContextTokens
from orchard.errors import DataError
from orchard.guide.guide import Guide
from orchard.settings import ServeConfig
from orchard.settings.widths import Width, at_least, widest
from serve.catalog.store import CatalogVersion
from serve.decoding.recommender import BatchKey, Query
from serve.errors import UnprocessableError
from serve.schema import Decoder, RecommendRequest

_NUMBERS = itertools.count()
RANDOM: tuple[Decoder, ...] = ("beam_sample", "ved")
"""Decoders whose answers depend on a seed."""
BY_LEVEL: tuple[Decoder, ...] = ("beam", "guided")
"""Decoders whose beam may have a width for each level."""
_NEEDS = {
    "ved": "a policy with a value head in the torch engine",
    "guided": "a policy with a guide (`orchard fit guide`)",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ResolvedRequest:
    """Request with its variant, history and defaults."""

    request: RecommendRequest
    history: list[int]
    variant: str
    decoder: Decoder
    exclude_seen: bool
    width: Width
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
    decoders: Sequence[Decoder],
    guide: Guide | None,
    depth: int,
    context: ContextTokens,
) -> ResolvedRequest:
    """Apply defaults to a request and check it against the configured limits.

    Args:
        request: validated request body.
        history: item ids of the request or of its user.
        variant: name of the variant that answers.
        config: limits and defaults.
        decoders: decoders that the variant supports.
        guide: guide of the variant's searches.
        depth: number of levels of the catalog's codes.
        context: context that the policy reads.

    Raises:
        UnprocessableError: the request exceeds a limit, names an unknown filter or an unsupported
            decoder, or gives context that the policy does not read.
    """
    if request.k > config.max_k:
        raise UnprocessableError(f"k = {request.k} exceeds {config.max_k}; ask for fewer items")
    if request.width and request.width > config.max_width:
        raise UnprocessableError(
            f"width = {request.width} exceeds {config.max_width}; ask for a narrower beam"
        )
    decoder = request.decoder or ("beam" if guide is None else "guided")
    if decoder not in decoders:
        raise UnprocessableError(
            f"decoder {decoder} needs {_NEEDS[decoder]}, which variant {variant} lacks; choose "
            f"{' or '.join(decoders)}"
        )
    unknown = sorted(set(request.filters) - config.filters.keys())
    if unknown:
        raise UnprocessableError(
            f"there is no filter {unknown[0]!r}; "
            f"known: {', '.join(sorted(config.filters)) or 'none'}"
        )
    try:
        context.read(request.context, len(history))
    except DataError as error:
        raise UnprocessableError(str(error)) from error
    return ResolvedRequest(
        request=request,
        history=history,
        variant=variant,
        decoder=decoder,
        exclude_seen=_excludes_seen(request, decoder, guide),
        width=request.width or at_least(_default_width(config.width, decoder, depth), request.k),
        seed=secrets.randbits(62) if request.seed is None else request.seed,
        levels=request.explain != "none" or config.exposure is not None,
    )


def _default_width(width: Width, decoder: Decoder, depth: int) -> Width:
    """Return the configured width as a decoder takes it, for codes of `depth` levels.

    A delta may have changed the number of levels since the setting was checked: the last width
    goes on, or surplus ones are left out.
    """
    if isinstance(width, int) or decoder not in BY_LEVEL:
        return widest(width)
    return (*width, *(width[-1:] * depth))[:depth]


def _excludes_seen(request: RecommendRequest, decoder: Decoder, guide: Guide | None) -> bool:
    """Return whether the history is excluded: as requested, or else by the guide's rule.

    Single draws of `beam_sample` have a known probability only where nothing is excluded.
    """
    if request.exclude_seen is not None:
        return request.exclude_seen
    return guide is not None and guide.exclude_seen and decoder != "beam_sample"


def batch_key(resolved: ResolvedRequest, width: Width, wide: int = 0) -> BatchKey:
    """Return the search parameters that all requests of a batch must share."""
    request = resolved.request
    return BatchKey(
        decoder=resolved.decoder,
        width=width,
        wide=wide,
        prove=request.k if resolved.decoder == "guided" else 0,
        filters=tuple(sorted(set(request.filters))),
        temperature=request.temperature if resolved.decoder == "beam_sample" else 1.0,
        trace=resolved.number if request.explain == "tree" else None,
    )


def query_of(resolved: ResolvedRequest) -> Query:
    """Return the part of a request that is specific to it within a batch."""
    request = resolved.request
    excluded = [*request.exclude, *(resolved.history if resolved.exclude_seen else ())]
    return Query(
        history=np.array(resolved.history, dtype=np.int64),
        k=request.k,
        exclude=np.array(excluded, dtype=np.int64),
        per_prefix=request.per_prefix,
        seed=resolved.seed,
        levels=resolved.levels,
        explain=request.explain != "none",
        context=request.context,
    )


def cache_key(
    resolved: ResolvedRequest, policy: str, guide: str, catalog_version: CatalogVersion
) -> tuple[object, ...] | None:
    """Return everything the answer depends on; None if the answer must not be cached.

    Policy and guide are named by their digests.
    """
    request = resolved.request
    if request.explain == "tree" or (resolved.decoder in RANDOM and request.seed is None):
        return None
    resolved_fields = {"decoder": resolved.decoder, "exclude_seen": resolved.exclude_seen}
    normalized = request.model_copy(
        update={"user": None, "deadline_ms": None, "history": [], **resolved_fields}
    )
    # A digest: histories and exclusions may hold thousands of items.
    content = f"{resolved.history}{normalized.model_dump_json()}".encode()
    return (
        resolved.variant,
        policy,
        guide,
        catalog_version.version,
        hashlib.blake2b(content, digest_size=16).digest(),
    )
