"""Decode scheduler: one queue and one search thread for all variants.

Between two searches the thread also scores given items, and runs work that must not overlap with a
search, such as a policy switch. A search switches the catalog itself: it uses the version that is
current when it starts.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from orchard.settings import ServeConfig
from orchard.settings.widths import at_most, widest
from rollout.candidates import Candidates
from rollout.engine.torch import TorchEngine
from serve.catalog.store import CatalogStore, CatalogVersion
from serve.decoding.batching import Batcher, BatchPlan, LatencyModel
from serve.decoding.recommender import BatchKey, Query, RankedItems, recommend
from serve.decoding.request import ResolvedRequest, batch_key, query_of, resolve
from serve.decoding.scoring import ScoredItems, rank_by_score, score
from serve.decoding.trace import Trace
from serve.errors import OverloadedError
from serve.metrics import ServeMetrics
from serve.policies.slot import PolicySlot
from serve.schema import Decoder, RecommendRequest

_log = logging.getLogger("orchard.serve")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecodeResult:
    """Result of one request, with its batch's candidates, trace and cost."""

    ranked: RankedItems
    candidates: Candidates
    """Candidates and cost of the whole batch."""
    trace: Trace
    catalog_version: CatalogVersion
    policy: str
    decoder: Decoder
    """Decoder that answered: `beam` in place of `guided` where the policy has lost its guide."""
    width: int
    """Beam width, at its widest level."""
    batch: int
    """Number of requests in the batch."""
    seconds: float


class DecodeScheduler:
    """Queue and search thread for all variants. Belongs to one event loop."""

    def __init__(
        self,
        config: ServeConfig,
        slots: Mapping[str, PolicySlot],
        catalog_store: CatalogStore,
        metrics: ServeMetrics,
        *,
        max_history: int,
    ) -> None:
        """Search the current version of `catalog_store` with the engines of `slots`."""
        self._slots, self._catalog_store, self._metrics = slots, catalog_store, metrics
        self._max_history, self._scoring_rows = max_history, 0
        self._config = config
        self._prefix_counts: dict[str, tuple[int, int]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decoder")
        self._latency = {name: LatencyModel() for name in slots}
        self._batcher = Batcher[ResolvedRequest, tuple[str, BatchKey], DecodeResult](
            self._run, self._plan, budget=config.budget, queue=config.queue,
            linger_s=config.batch_wait_ms / 1000,
        )  # fmt: skip

    @property
    def waiting_rows(self) -> int:
        """Number of beam rows and of items to score that wait."""
        return self._batcher.waiting_rows + self._scoring_rows

    def resolve(
        self, request: RecommendRequest, history: list[int], variant: str
    ) -> ResolvedRequest:
        """Resolve a request for a variant; see `serve.decoding.request.resolve`."""
        slot, tokenizer = self._slots[variant], self._catalog_store.current.tokenizer
        return resolve(
            request, history, variant, self._config, decoders=slot.decoders, guide=slot.guide,
            depth=tokenizer.trie.depth, context=tokenizer.context,
        )  # fmt: skip

    async def submit(
        self, resolved: ResolvedRequest, *, deadline: float = float("inf")
    ) -> DecodeResult:
        """Queue a request and return its result; see `Batcher.submit`."""
        return await self._batcher.submit(resolved, rows=widest(resolved.width), deadline=deadline)

    async def score(
        self, resolved: ResolvedRequest, items: Sequence[int], *, order: bool
    ) -> ScoredItems:
        """Score items between two searches; with `order`, rank them.

        Raises:
            OverloadedError: too many beam rows and items wait already.
            EngineError: as `scoring.score`.
        """
        if self.waiting_rows + len(items) > self._config.queue:
            raise OverloadedError(
                f"{self.waiting_rows} rows wait and {len(items)} more exceed the bound of "
                f"{self._config.queue}; try again later, or with fewer items",
                retry_after_s=1.0,
            )
        self._scoring_rows += len(items)
        try:
            return await self.run_exclusive(self._score, resolved, items, order)
        finally:
            self._scoring_rows -= len(items)

    def _score(self, resolved: ResolvedRequest, items: Sequence[int], order: bool) -> ScoredItems:
        """Score items; runs in the search thread."""
        slot, catalog_version = self._slots[resolved.variant], self._catalog_store.current
        slot.set_catalog(catalog_version.catalog)
        scored = score(
            slot.inference_engine, catalog_version, query_of(resolved),
            np.array(items, dtype=np.int64), max_history=self._max_history,
        )  # fmt: skip
        scored = replace(scored, policy=str(slot.version))
        return rank_by_score(catalog_version, scored) if order else scored

    async def run_exclusive(self, call: Callable[..., T], *args: object) -> T:
        """Run a call in the search thread, between two searches."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *args)

    async def warm(self, resolved: ResolvedRequest) -> None:
        """Run one search that bypasses the queue and the metrics."""
        await self.run_exclusive(
            self._search, (resolved.variant, batch_key(resolved, resolved.width)), [resolved]
        )

    async def close(self) -> None:
        """Answer the queued requests, then stop the search thread."""
        await self._batcher.close()
        self._thread.shutdown()

    def _plan(
        self, resolved: ResolvedRequest, left_s: float
    ) -> BatchPlan[tuple[str, BatchKey]] | None:
        """Return the widest search that finishes before the deadline, None if there is none."""
        wanted = widest(resolved.width)
        least = min(resolved.request.k, wanted)
        latency = self._latency[resolved.variant]
        width = latency.width(wanted=wanted, least=least, left_s=left_s)
        if width is None or left_s <= 0:
            return None
        wide = (
            self._config.wide if resolved.decoder == "guided" and self._config.wide > width else 0
        )
        if wide and latency.seconds(width + wide) > left_s:
            wide = 0
        key = batch_key(resolved, at_most(resolved.width, width), wide)
        return BatchPlan((resolved.variant, key), max(width, wide))

    async def _run(
        self, kind: tuple[str, BatchKey], batch: Sequence[ResolvedRequest], waited: Sequence[float]
    ) -> list[DecodeResult]:
        """Search a batch in the search thread and record its metrics."""
        results = await self.run_exclusive(self._search, kind, batch)
        variant, key = kind
        again = results[0].candidates.cost.counts.get("searched_again", 0)
        num_rows = len(batch) * widest(key.width) + int(again) * key.wide
        trace, seconds = results[0].trace, results[0].seconds
        self._latency[variant].observe(num_rows, seconds)
        for waited_s in waited:
            self._observe_phase(variant, "queue", waited_s)
        self._observe_phase(variant, "prefill", trace.prefill_s)
        self._observe_phase(variant, "levels", trace.levels_s)
        post_s = max(0.0, seconds - trace.prefill_s - trace.levels_s)
        self._observe_phase(variant, "post", post_s)
        fill = min(1.0, num_rows / self._config.budget)
        self._metrics.observe("orchard_serve_beam_fill", fill, variant=variant)
        self._count_prefixes(variant)
        return results

    def _search(
        self, kind: tuple[str, BatchKey], batch: Sequence[ResolvedRequest]
    ) -> list[DecodeResult]:
        """Search a batch; runs in the search thread."""
        start_time = time.monotonic()
        variant, key = kind
        slot, catalog_version = self._slots[variant], self._catalog_store.current
        slot.set_catalog(catalog_version.catalog)
        trace = Trace(record_steps=key.trace is not None)
        queries = [query_of(resolved) for resolved in batch]
        ranked, candidates = recommend(
            slot.inference_engine, catalog_version, queries, key,
            max_history=self._max_history, trace=trace, guide=slot.guide,
        )  # fmt: skip
        self._check_legal(catalog_version, kind, queries, ranked)
        unguided = key.decoder == "guided" and slot.guide is None
        seconds = time.monotonic() - start_time
        return [
            DecodeResult(
                ranked=of_query, candidates=candidates, trace=trace,
                catalog_version=catalog_version, policy=str(slot.version), width=widest(key.width),
                decoder="beam" if unguided else key.decoder, batch=len(batch), seconds=seconds,
            )
            for of_query in ranked
        ]  # fmt: skip

    def _check_legal(
        self,
        catalog_version: CatalogVersion,
        kind: tuple[str, BatchKey],
        queries: Sequence[Query],
        ranked: Sequence[RankedItems],
    ) -> None:
        """Count and log illegal items; a safeguard, since the search admits none."""
        variant, key = kind
        filtered = catalog_version.filtered_items(key.filters)
        for query, of_query in zip(queries, ranked, strict=True):
            ids = np.array([item.item_id for item in of_query.items], dtype=np.int64)
            rows, in_catalog = catalog_version.catalog.lookup(ids)
            illegal = ~in_catalog | ~filtered.items[rows] | np.isin(ids, query.exclude)
            if illegal.any():
                num_illegal = int(illegal.sum())
                self._metrics.count("orchard_serve_illegal", by=float(num_illegal), variant=variant)
                _log.error("%d illegal items in an answer of %s", num_illegal, variant)

    def _count_prefixes(self, variant: str) -> None:
        """Record how much of the prompts the engine had kept since the last call."""
        engine = self._slots[variant].inference_engine
        prefixes = engine.prefixes if isinstance(engine, TorchEngine) else None
        if prefixes is None:
            return
        hits, tokens = prefixes.hits, prefixes.tokens
        before = self._prefix_counts.get(variant, (0, 0))
        self._prefix_counts[variant] = (hits, tokens)
        count = self._metrics.count
        if hits > before[0]:
            count("orchard_serve_prefix_hits", by=float(hits - before[0]), variant=variant)
            count("orchard_serve_prefix_tokens", by=float(tokens - before[1]), variant=variant)
        size = float(prefixes.num_bytes)
        self._metrics.set("orchard_serve_prefix_bytes", size, variant=variant)

    def _observe_phase(self, variant: str, phase: str, seconds: float) -> None:
        self._metrics.observe("orchard_serve_phase_seconds", seconds, variant=variant, phase=phase)
