"""The service: takes requests one by one, and has them answered in batches.

    request -> variant -> cache -> queue -> batch -> search -> answer -> exposure log

Beside that, it follows training and the other replicas. Belongs to one event loop.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

from cachetools import TTLCache

from orchard.errors import EngineError
from orchard.settings import ServeConfig
from serve.catalog.store import CatalogStore, CatalogVersion
from serve.decoding.batching import TooLateError
from serve.decoding.recommender import RankedItems, popular_items
from serve.decoding.request import ResolvedRequest, cache_key, query_of, resolve
from serve.decoding.scheduler import DecodeResult, DecodeScheduler
from serve.decoding.trace import draw_tree
from serve.errors import ConflictError, UnavailableError, UnknownNameError
from serve.exposure_log import ExposureLog
from serve.metrics import ServeMetrics
from serve.policies.ab_test import MAIN, assign_variant
from serve.policies.slot import LATEST, LoadedPolicy, PolicySlot
from serve.schema import (
    ActivateRequest,
    Cost,
    DeltaRequest,
    RecommendRequest,
    RecommendResponse,
)
from serve.shared_state import SharedState
from serve.user_history import Histories

_log = logging.getLogger("orchard.serve")
T = TypeVar("T")


class Service:
    """Answers requests from several policies and one catalog."""

    def __init__(
        self,
        config: ServeConfig,
        slots: Mapping[str, PolicySlot],
        catalog_store: CatalogStore,
        shared_state: SharedState,
        meters: ServeMetrics,
        *,
        max_history: int,
        histories: Histories,
        exposure: ExposureLog | None = None,
    ) -> None:
        """Ready to `start`; `slots` holds `main` and the other variants."""
        self.config, self.slots = config, slots
        self.catalog_store, self.meters = catalog_store, meters
        self._shared_state, self._exposure = shared_state, exposure
        self._histories, self._max_history = histories, max_history
        self._shares = {n: s.share for n, s in slots.items() if n != MAIN and not s.shadow}
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._line = DecodeScheduler(config, slots, catalog_store, meters, max_history=max_history)
        self._cache: TTLCache[object, RecommendResponse] | None = None
        if config.cache_s:
            self._cache = TTLCache(config.cache_size, config.cache_s)
        self._tasks = set[asyncio.Future[None]]()
        self._following: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()
        self.ready = False

    async def start(self) -> None:
        """Catch up with the other replicas, warm the engines, begin to follow."""
        await self._load(self._shared_state.catch_up, self.catalog_store)
        warm = RecommendRequest(history=[], k=1)
        for name, slot in self.slots.items():
            await self._follow_pin(slot)
            await self._line.warm(self._settle(warm, [], name))
        self._following = asyncio.create_task(self._follow())
        self.ready = True

    async def close(self) -> None:
        """Answer what waits, write what was logged, stop the threads."""
        self.ready = False
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        await self._line.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._exposure is not None:
            await self._load(self._exposure.flush)
        await self._histories.close()
        self._loader.shutdown()

    async def recommend(self, request: RecommendRequest, request_id: str) -> RecommendResponse:
        """The items for one request.

        Raises:
            Refusal: the request does not fit, or cannot be answered now.
        """
        if not self.ready:
            raise UnavailableError("the policy is still being loaded; try again in a moment")
        began = time.monotonic()
        history = await self._history_of(request)
        variant = assign_variant(request.user, self._shares, self.config.ab_salt)
        asked = self._settle(request, history, variant)
        cache, key = self._cache, None
        if cache is not None:
            key = cache_key(asked, str(self.slots[variant].version), self.catalog_store.current)
        known = cache.get(key) if cache is not None and key is not None else None
        if known is not None:
            self.meters.count("orchard_serve_cache_hits", variant=variant)
            answer = known.model_copy(update={"source": "cache"})
        else:
            answer = await self._answer(asked, began)
            whole = not answer.fallback and asked.width == answer.width
            if cache is not None and key is not None and whole:
                cache[key] = answer
        self._note(asked, answer, request_id, shadow=False)
        for name, slot in self.slots.items():
            if slot.shadow and self._line.waiting_rows < self.config.queue // 2:
                self._spawn(self._shadow(asked, name, request_id))
        self.meters.observe(
            "orchard_serve_phase_seconds", time.monotonic() - began, variant=variant, phase="total"
        )
        self.meters.count(
            "orchard_serve_requests", variant=variant, source=answer.source, policy=answer.policy
        )
        if asked.levels and asked.request.explain == "none":  # they were for the exposure log
            items = [item.model_copy(update={"levels": None}) for item in answer.items]
            return answer.model_copy(update={"items": items})
        return answer

    async def explore(self, request: RecommendRequest, variant: str) -> RecommendResponse:
        """The answer of one variant, past cache, figures and log.

        Raises:
            Refusal: the request does not fit, or cannot be answered now.
        """
        if variant not in self.slots:
            raise UnknownNameError(f"there is no such variant; known: {', '.join(self.slots)}")
        history = await self._history_of(request)
        return await self._answer(self._settle(request, history, variant), time.monotonic())

    async def change(self, delta: DeltaRequest) -> CatalogVersion:
        """Work a delta out and, unless it is a dry run, put it in place for all replicas.

        Raises:
            Refusal: it does not fit, or was made for another version.
        """
        async with self._changing:
            await self._load(self._shared_state.catch_up, self.catalog_store)
            catalog_version = await self._load(self.catalog_store.apply, delta)
            if not delta.dry_run:
                await self._load(self._shared_state.append, catalog_version.version, delta)
                self.catalog_store.activate(catalog_version)
            return catalog_version

    async def activate(self, request: ActivateRequest) -> None:
        """Pin a kept version of a variant's policy, or follow training again.

        Raises:
            Refusal: there is no such variant or version, or its probe fails.
        """
        async with self._changing:
            if request.variant not in self.slots:
                raise UnknownNameError(
                    f"there is no variant {request.variant!r}; known: {', '.join(self.slots)}"
                )
            slot = self.slots[request.variant]
            if request.version == LATEST:
                slot.unpin()
            else:
                await self._pin(slot, request.version)
            await self._load(
                self._shared_state.pin,
                slot.name,
                None if request.version == LATEST else request.version,
            )

    async def look(self) -> None:
        """Follow the other replicas and training once; what `start` does every `follow_s`."""
        async with self._changing:
            await self._load(self._shared_state.catch_up, self.catalog_store)
            for slot in self.slots.values():
                await self._follow_pin(slot)
                loaded = await self._load(slot.poll)
                if loaded is None:
                    continue
                if await self._switch(slot, loaded):
                    await self._load(slot.archive, loaded)
                else:
                    _log.warning("variant %s keeps %s: %s", slot.name, slot.version, slot.refused)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self.config.poll_interval_s)
            try:
                await self.look()
                if self._exposure is not None:
                    await self._load(self._exposure.flush)
            except Exception:
                _log.exception(
                    "following failed; it is tried again in %g s", self.config.poll_interval_s
                )
            for name, slot in self.slots.items():
                self.meters.set("orchard_serve_policy_step", slot.version.step, variant=name)
            self.meters.set("orchard_serve_catalogue_version", self.catalog_store.current.version)
            self.meters.set("orchard_serve_queue_rows", self._line.waiting_rows)

    async def _follow_pin(self, slot: PolicySlot) -> None:
        """Hold the version that all replicas are to hold."""
        pinned = await self._load(self._shared_state.pinned, slot.name)
        if pinned is None and slot.pinned is not None:
            slot.unpin()
        elif pinned is not None and pinned != slot.pinned:
            try:
                await self._pin(slot, pinned)
            except (UnknownNameError, ConflictError) as error:
                slot.refused = str(error)

    async def _pin(self, slot: PolicySlot, version: str) -> None:
        loaded = await self._load(slot.load_archived, version)
        if str(slot.version) != version and not await self._switch(slot, loaded):
            raise ConflictError(slot.refused)
        slot.pinned = version

    async def _switch(self, slot: PolicySlot, loaded: LoadedPolicy) -> bool:
        # Under the lock that changes of the catalog take, too: both look at the same one.
        catalog = self.catalog_store.current.catalog
        expected = await self._load(slot.reference_scores, loaded, catalog)
        if expected is None:
            return False
        return await self._line.run_exclusive(slot.switch, loaded, catalog, expected)

    async def _history_of(self, request: RecommendRequest) -> list[int]:
        if request.history is not None:
            return request.history
        return await self._histories.of(request.user or "")

    def _settle(
        self, request: RecommendRequest, history: list[int], variant: str
    ) -> ResolvedRequest:
        return resolve(request, history, variant, self.config, guided=self.slots[variant].guided)

    async def _answer(self, asked: ResolvedRequest, began: float) -> RecommendResponse:
        """Through the queue; what is popular, where the policy cannot answer in time."""
        limit = asked.request.deadline_ms or self.config.deadline_ms
        deadline = began + limit / 1000 if limit else float("inf")
        try:
            answered = await self._line.submit(asked, deadline=deadline)
        except TooLateError as error:
            return await self._fallback(asked, "deadline", error)
        except EngineError as error:
            _log.error("variant %s cannot search: %s", asked.variant, error)
            return await self._fallback(asked, "engine", error)
        return await self._respond(asked, answered)

    async def _fallback(
        self, asked: ResolvedRequest, why: Literal["deadline", "engine"], error: Exception
    ) -> RecommendResponse:
        catalog_version = self.catalog_store.current
        if not catalog_version.popularity:
            raise UnavailableError(
                "the deadline cannot be kept; allow more time"
                if why == "deadline"
                else "the policy cannot search at the moment; try again"
            ) from error
        self.meters.count("orchard_serve_fallbacks", variant=asked.variant, reason=why)
        filters = tuple(asked.request.filters)
        # A pass over the whole catalog: other requests do not wait for it.
        found = await asyncio.to_thread(popular_items, catalog_version, query_of(asked), filters)
        return self._response(
            asked, found, catalog_version,
            policy=str(self.slots[asked.variant].version), source="popularity", fallback=why,
            width=0, cost=Cost(prefill_tokens=0, forward_tokens=0, passes=0, batch=0, seconds=0.0),
        )  # fmt: skip

    async def _respond(self, asked: ResolvedRequest, answered: DecodeResult) -> RecommendResponse:
        spent, found = answered.candidates.cost, answered.found
        answer = self._response(
            asked, found, answered.catalog_version,
            policy=answered.policy, source="policy", fallback="", width=answered.width,
            cost=Cost(
                prefill_tokens=spent.prefill_tokens, forward_tokens=spent.forward_tokens,
                passes=spent.passes, batch=answered.batch, seconds=answered.seconds,
            ),
        )  # fmt: skip
        if asked.request.explain == "tree":
            seen = answered.watch.seen
            # A wide search has seen thousands of prefixes: other requests do not wait for it.
            tree = await asyncio.to_thread(
                draw_tree, answered.catalog_version, answered.candidates, seen, found.leaf
            )
            return answer.model_copy(update={"tree": tree})
        return answer

    def _response(
        self,
        asked: ResolvedRequest,
        found: RankedItems,
        catalog_version: CatalogVersion,
        **facts: Any,
    ) -> RecommendResponse:
        # Everything in it was made here: validating it again would cost more than making it.
        drawn = asked.request.decoder != "beam"
        return RecommendResponse.model_construct(
            items=found.items, returned=len(found.items), asked=asked.request.k,
            fewer=found.fewer, variant=asked.variant, catalog=catalog_version.name,
            decoder=asked.request.decoder, seed=asked.seed if drawn else None,
            unknown=found.unknown, tree=None, **facts,
        )  # fmt: skip

    async def _shadow(self, asked: ResolvedRequest, name: str, request_id: str) -> None:
        """Let another policy answer the same request, for the log."""
        try:
            other = self._settle(asked.request, asked.history, name)
            answered = await self._line.submit(other)
        except Exception as error:
            _log.info("shadow %s did not answer: %s", name, error)
            return
        answer = await self._respond(other, answered)
        self._note(other, answer, request_id, shadow=True)

    def _note(
        self, asked: ResolvedRequest, answer: RecommendResponse, request_id: str, *, shadow: bool
    ) -> None:
        if self._exposure is None:
            return
        request = asked.request
        restricted = bool(request.exclude or request.exclude_seen or request.filters)
        full = self._exposure.add(
            answer, request_id=request_id, user=request.user,
            history=asked.history[-self._max_history :], temperature=request.temperature,
            restricted=restricted or not self.catalog_store.current.snapshot.live.all(),
            shadow=shadow,
        )  # fmt: skip
        if full:
            self._spawn(self._load(self._exposure.flush))

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _load(self, call: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._loader, call, *args)
