"""Recommendation service: batched answers from several policy variants and one catalog.

    request -> variant -> cache -> queue -> batch -> search -> answer -> exposure log

The service also follows training and the other replicas. It belongs to one event loop.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Literal, TypeVar

import numpy as np
from cachetools import TTLCache

from orchard.errors import EngineError
from orchard.settings import ServeConfig
from orchard.settings.widths import widest
from serve.catalog.schema import AssignedItem, DeltaRequest, EventsInfo, EventsRequest
from serve.catalog.store import CatalogStore, CatalogVersion
from serve.decoding.batching import TooLateError
from serve.decoding.recommender import popular_items
from serve.decoding.request import ResolvedRequest, cache_key, query_of
from serve.decoding.response import (
    build_response,
    build_score_response,
    build_search_response,
)
from serve.decoding.scheduler import DecodeResult, DecodeScheduler
from serve.decoding.trace import draw_tree
from serve.errors import UnavailableError, UnknownNameError
from serve.exposure_log import ExposureLog
from serve.metrics import ServeMetrics
from serve.policies.ab_test import MAIN, assign_variant
from serve.policies.slot import PolicySlot
from serve.schema import (
    ActivateRequest,
    Cost,
    RecommendRequest,
    RecommendResponse,
    ScoreRequest,
    ScoreResponse,
)
from serve.shared_state import SharedState
from serve.synchronizer import Synchronizer
from serve.user_history import Histories

_log = logging.getLogger("orchard.serve")
_FAILURES = 3
"""Failed searches in a row after which an endpoint is not ready."""
T = TypeVar("T")


class Service:
    """Service that answers requests from several policies and one catalog."""

    def __init__(
        self,
        config: ServeConfig,
        slots: Mapping[str, PolicySlot],
        catalog_store: CatalogStore,
        shared_state: SharedState,
        metrics: ServeMetrics,
        *,
        max_history: int,
        histories: Histories,
        exposure: ExposureLog | None = None,
    ) -> None:
        """Create a service that `start` makes ready; `slots` contains `main` and other variants."""
        self.config, self.slots = config, slots
        self.catalog_store, self.metrics = catalog_store, metrics
        self._exposure = exposure
        self._histories, self._max_history = histories, max_history
        self._shares = {n: s.share for n, s in slots.items() if n != MAIN and not s.shadow}
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._scheduler = DecodeScheduler(
            config, slots, catalog_store, metrics, max_history=max_history
        )
        self._cache: TTLCache[object, tuple[RecommendResponse, CatalogVersion]] | None = None
        if config.cache_s:
            self._cache = TTLCache(config.cache_size, config.cache_s)
        self._tasks = set[asyncio.Future[None]]()
        self._following: asyncio.Task[None] | None = None
        self._synchronizer = Synchronizer(
            slots, catalog_store, shared_state, self._scheduler, self._in_loader
        )
        self._failures = dict.fromkeys(slots, 0)
        self.ready = False

    @property
    def catalog_refused(self) -> str:
        """Reason for not applying newer deltas, without paths; empty if they are applied."""
        return self._synchronizer.catalog_refused

    @property
    def failing(self) -> bool:
        """Whether the last searches of the main policy all failed."""
        return self._failures[MAIN] >= _FAILURES

    async def start(self) -> None:
        """Catch up with the other replicas, warm up the engines and start following training."""
        await self._synchronizer.start()
        warmup = RecommendRequest(history=[], k=1)
        for name in self.slots:
            await self._scheduler.warm(self._scheduler.resolve(warmup, [], name))
        self._following = asyncio.create_task(self._follow())
        self._set_gauges()
        self.ready = True

    async def close(self) -> None:
        """Answer queued requests, flush the exposure log and stop the threads."""
        self.ready = False
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        await self._scheduler.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._exposure is not None:
            await self._in_loader(self._exposure.flush)
        await self._histories.close()
        self._loader.shutdown()

    async def recommend(self, request: RecommendRequest, request_id: str) -> RecommendResponse:
        """Answer one request.

        Raises:
            ApiError: the request is invalid, or cannot be answered now.
        """
        if not self.ready:
            raise UnavailableError("the policy is still being loaded; try again in a moment")
        start_time = time.monotonic()
        history = await self._history_of(request)
        variant = assign_variant(request.user, self._shares, self.config.ab_salt)
        resolved = self._scheduler.resolve(request, history, variant)
        cache, key = self._cache, None
        if cache is not None:
            slot = self.slots[variant]
            catalog_version = self.catalog_store.current
            key = cache_key(resolved, str(slot.version), slot.guide_version, catalog_version)
        cached = cache.get(key) if cache is not None and key is not None else None
        if cached is not None:
            self.metrics.count("orchard_serve_cache_hits", variant=variant)
            answer = cached[0].model_copy(update={"source": "cache"})
            catalog_version = cached[1]
        else:
            answer, catalog_version = await self._answer(resolved, start_time)
            is_complete = not answer.fallback and widest(resolved.width) == answer.width
            if self.config.wide and answer.proved is False:  # a wider search may have had no time
                is_complete = not (request.deadline_ms or self.config.deadline_ms)
            if cache is not None and key is not None and is_complete:
                cache[key] = answer, catalog_version
        self._log_exposure(resolved, answer, catalog_version, request_id, shadow=False)
        for name, slot in self.slots.items():
            if slot.shadow and self._scheduler.waiting_rows < self.config.queue // 2:
                self._spawn(self._shadow(resolved, name, request_id))
        self._count(variant, answer.source, answer.policy, time.monotonic() - start_time)
        if resolved.levels and resolved.request.explain == "none":  # only for the exposure log
            items = [item.model_copy(update={"levels": None}) for item in answer.items]
            return answer.model_copy(update={"items": items})
        return answer

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """Score the items of a request after its history; raises as `recommend`."""
        if not self.ready:
            raise UnavailableError("the policy is still being loaded; try again in a moment")
        start_time = time.monotonic()
        variant = assign_variant(request.user, self._shares, self.config.ab_salt)
        body = RecommendRequest(
            history=request.history, user=request.user, context=request.context, k=1
        )
        resolved = self._scheduler.resolve(body, await self._history_of(body), variant)
        resolved = replace(resolved, levels=request.explain == "levels")
        try:
            scored = await self._scheduler.score(resolved, request.items, order=request.order)
        except EngineError as error:
            _log.error("variant %s cannot score: %s", variant, error)
            raise UnavailableError("the policy cannot score at the moment; try again") from error
        answer = build_score_response(scored, variant, time.monotonic() - start_time)
        self._count(variant, "score", scored.policy, answer.cost.seconds)
        return answer

    async def explore(self, request: RecommendRequest, variant: str) -> RecommendResponse:
        """Answer one request with a given variant, without cache, metrics or exposure log.

        Raises:
            ApiError: the request is invalid, or cannot be answered now.
        """
        if variant not in self.slots:
            raise UnknownNameError(f"there is no such variant; known: {', '.join(self.slots)}")
        history = await self._history_of(request)
        resolved = self._scheduler.resolve(request, history, variant)
        answer, _ = await self._answer(resolved, time.monotonic())
        return answer

    def _count(self, variant: str, source: str, policy: str, seconds: float) -> None:
        """Record an answer in the metrics."""
        self.metrics.observe("orchard_serve_phase_seconds", seconds, variant=variant, phase="total")
        self.metrics.count("orchard_serve_requests", variant=variant, source=source, policy=policy)

    async def change(self, delta: DeltaRequest) -> tuple[CatalogVersion, list[AssignedItem]]:
        """Apply a delta to the catalog; see `Synchronizer.change`."""
        return await self._synchronizer.change(delta)

    async def count_events(self, request: EventsRequest) -> EventsInfo:
        """Add events to the counts of the guides; see `Synchronizer.count_events`."""
        return await self._synchronizer.count_events(request)

    async def activate(self, request: ActivateRequest) -> None:
        """Pin a policy version; see `Synchronizer.activate`."""
        await self._synchronizer.activate(request)

    async def poll(self) -> None:
        """Poll the other replicas and training once; runs every `poll_interval_s` after `start`."""
        await self._synchronizer.poll()

    async def _follow(self) -> None:
        """Poll forever, flush the exposure log and set the gauges."""
        while True:
            await asyncio.sleep(self.config.poll_interval_s)
            try:
                await self.poll()
                if self._exposure is not None:
                    await self._in_loader(self._exposure.flush)
            except Exception:
                _log.exception("following failed; retrying in %g s", self.config.poll_interval_s)
            self._set_gauges()

    def _set_gauges(self) -> None:
        """Set all gauges; Ray forgets one that is not set again and again."""
        gauge = self.metrics.set
        for name, slot in self.slots.items():
            gauge("orchard_serve_policy_step", float(slot.version.step), variant=name)
            gauge("orchard_serve_policy_refused", float(bool(slot.refused)), variant=name)
        gauge("orchard_serve_catalogue_version", float(self.catalog_store.current.version))
        gauge("orchard_serve_catalogue_refused", float(bool(self.catalog_refused)))
        gauge("orchard_serve_queue_rows", float(self._scheduler.waiting_rows))

    async def _history_of(self, request: RecommendRequest) -> list[int]:
        """Return the history of the request, or that of its user from the store."""
        if request.history is not None:
            return request.history
        return await self._histories.of(request.user or "")

    async def _answer(
        self, resolved: ResolvedRequest, start_time: float
    ) -> tuple[RecommendResponse, CatalogVersion]:
        """Search through the queue; return popular items if the policy cannot answer in time.

        Also returns the catalog version that answered.
        """
        limit = resolved.request.deadline_ms or self.config.deadline_ms
        deadline = start_time + limit / 1000 if limit else float("inf")
        try:
            result = await self._scheduler.submit(resolved, deadline=deadline)
        except TooLateError as error:
            return await self._fallback(resolved, "deadline", error)
        except EngineError as error:
            _log.error("variant %s cannot search: %s", resolved.variant, error)
            self._failures[resolved.variant] += 1
            return await self._fallback(resolved, "engine", error)
        self._failures[resolved.variant] = 0
        return await self._respond(resolved, result), result.catalog_version

    async def _fallback(
        self, resolved: ResolvedRequest, why: Literal["deadline", "engine"], error: Exception
    ) -> tuple[RecommendResponse, CatalogVersion]:
        """Answer with popular items; raise UnavailableError if there are no counts."""
        catalog_version = self.catalog_store.current
        if not catalog_version.popularity:
            raise UnavailableError(
                "the deadline cannot be kept; allow more time"
                if why == "deadline"
                else "the policy cannot search at the moment; try again"
            ) from error
        self.metrics.count("orchard_serve_fallbacks", variant=resolved.variant, reason=why)
        filters = tuple(resolved.request.filters)
        # In a thread: this scans the whole catalog and must not block the event loop.
        ranked = await asyncio.to_thread(
            popular_items, catalog_version, query_of(resolved), filters
        )
        answer = build_response(
            resolved, ranked, catalog_version, resolved.decoder,
            policy=str(self.slots[resolved.variant].version), source="popularity", fallback=why,
            width=0, cost=Cost(prefill_tokens=0, forward_tokens=0, passes=0, batch=0, seconds=0.0),
        )  # fmt: skip
        return answer, catalog_version

    async def _respond(self, resolved: ResolvedRequest, result: DecodeResult) -> RecommendResponse:
        """Build the response from a search result, with its tree if requested."""
        answer = build_search_response(resolved, result)
        if resolved.request.explain == "tree":
            steps = result.trace.steps
            # In a thread: a wide search expands thousands of prefixes.
            tree = await asyncio.to_thread(
                draw_tree, result.catalog_version, result.candidates, steps, result.ranked.leaf
            )
            return answer.model_copy(update={"tree": tree})
        return answer

    async def _shadow(self, resolved: ResolvedRequest, name: str, request_id: str) -> None:
        """Answer the same request with a shadow variant, for the exposure log only."""
        try:
            shadowed = self._scheduler.resolve(resolved.request, resolved.history, name)
            result = await self._scheduler.submit(shadowed)
        except Exception as error:
            _log.info("shadow %s did not answer: %s", name, error)
            return
        answer = await self._respond(shadowed, result)
        self._log_exposure(shadowed, answer, result.catalog_version, request_id, shadow=True)

    def _log_exposure(
        self,
        resolved: ResolvedRequest,
        answer: RecommendResponse,
        catalog_version: CatalogVersion,
        request_id: str,
        *,
        shadow: bool,
    ) -> None:
        """Add an answer to the exposure log, if there is one, and flush a full buffer."""
        if self._exposure is None:
            return
        request = resolved.request
        has_exclusions = bool(request.exclude or resolved.exclude_seen or request.filters)
        # The log has no context, so that nobody can tell the probability of such an answer later.
        is_restricted = has_exclusions or request.context is not None
        history = np.array(resolved.history, np.int64)
        _, is_known = catalog_version.catalog.lookup(history)
        is_full = self._exposure.add(
            answer, request_id=request_id, user=request.user,
            history=history[is_known][-self._max_history :].tolist(),  # as the policy reads it
            temperature=request.temperature,
            restricted=is_restricted or not catalog_version.is_whole, shadow=shadow,
        )  # fmt: skip
        if is_full:
            self._spawn(self._in_loader(self._exposure.flush))

    def _spawn(self, work: Awaitable[None]) -> None:
        """Run in the background; `close` waits for it."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _in_loader(self, call: Callable[..., T], *args: object) -> T:
        """Run a blocking call in the loader thread, one at a time."""
        return await asyncio.get_running_loop().run_in_executor(self._loader, call, *args)
