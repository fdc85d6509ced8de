"""A request on its way: its variant chosen, its defaults settled."""

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
    """A request with its defaults settled."""

    request: RecommendRequest
    history: list[int]
    variant: str
    width: int
    """Wanted; a deadline may narrow it."""
    seed: int
    levels: bool
    """Log-probabilities by level are needed."""
    number: int = field(default_factory=_NUMBERS.__next__)


def resolve(
    request: RecommendRequest,
    history: list[int],
    variant: str,
    config: ServeConfig,
    *,
    guided: bool,
) -> ResolvedRequest:
    """The request with its defaults.

    Args:
        request: as it came.
        history: of the request, or of its user.
        variant: that answers.
        config: bounds and defaults.
        guided: the variant can search by values.

    Raises:
        UnsuitableError: it exceeds a bound, or names what is not there.
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


def batch_key(asked: ResolvedRequest, width: int) -> BatchKey:
    """What it shares with the other requests of its batch."""
    request = asked.request
    return BatchKey(
        decoder=request.decoder,
        width=width,
        filters=tuple(sorted(set(request.filters))),
        temperature=request.temperature if request.decoder == "beam_sample" else 1.0,
        trace=asked.number if request.explain == "tree" else None,
    )


def query_of(asked: ResolvedRequest) -> Query:
    """What is its own."""
    request = asked.request
    excluded = [*request.exclude, *(asked.history if request.exclude_seen else ())]
    return Query(
        history=np.array(asked.history, dtype=np.int64),
        k=request.k,
        exclude=np.array(excluded, dtype=np.int64),
        per_prefix=request.per_prefix,
        seed=asked.seed,
        levels=asked.levels,
    )


def cache_key(
    asked: ResolvedRequest, policy: str, catalog_version: CatalogVersion
) -> tuple[object, ...] | None:
    """What the answer depends on; None where it is drawn anew every time."""
    request = asked.request
    if request.explain == "tree" or (request.decoder != "beam" and request.seed is None):
        return None
    settled = request.model_copy(update={"user": None, "deadline_ms": None, "history": []})
    # As long as a history and its exclusions may be, their digest is as short.
    whole = f"{asked.history}{settled.model_dump_json()}".encode()
    return (
        asked.variant,
        policy,
        catalog_version.version,
        hashlib.blake2b(whole, digest_size=16).digest(),
    )
