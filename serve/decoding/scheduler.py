"""Where requests wait and are searched: one queue, one thread that searches, for all variants.

Between two searches the thread does other work that no search must see half done, such as a switch
of policies. Catalogs are switched by the search itself: it takes the catalog version in use when it
begins.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from orchard.settings import ServeConfig
from orchard.types import Prompts
from rollout.candidates import Candidates
from rollout.engine.protocol import DecodingBackend, SearchRunner
from serve.catalog.store import CatalogStore, CatalogVersion
from serve.decoding.batching import Batcher, BatchPlan, LatencyModel
from serve.decoding.recommender import BatchKey, Query, RankedItems, recommend
from serve.decoding.request import ResolvedRequest, batch_key, query_of
from serve.decoding.trace import Watched
from serve.metrics import ServeMetrics
from serve.policies.slot import PolicySlot

_log = logging.getLogger("orchard.serve")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecodeResult:
    """What a batch made of one request."""

    found: RankedItems
    candidates: Candidates
    """Of the whole batch, as is what it cost."""
    watch: Watched
    catalog_version: CatalogVersion
    policy: str
    width: int
    batch: int
    """Requests in it."""
    seconds: float


class DecodeScheduler:
    """The queue and the search. Belongs to one event loop."""

    def __init__(
        self,
        config: ServeConfig,
        slots: Mapping[str, PolicySlot],
        catalog_store: CatalogStore,
        meters: ServeMetrics,
        *,
        max_history: int,
    ) -> None:
        """Search with the engines of `slots` in what `catalog_store` has on its catalog version."""
        self._slots, self._catalog_store, self._meters = slots, catalog_store, meters
        self._budget, self._max_history = config.budget, max_history
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decoder")
        self._pace = {name: LatencyModel() for name in slots}
        self._batcher = Batcher[ResolvedRequest, tuple[str, BatchKey], DecodeResult](
            self._run, self._plan, budget=config.budget, queue=config.queue,
            linger_s=config.batch_wait_ms / 1000,
        )  # fmt: skip

    @property
    def waiting_rows(self) -> int:
        """Beam rows in the queue."""
        return self._batcher.waiting_rows

    async def submit(
        self, asked: ResolvedRequest, *, deadline: float = float("inf")
    ) -> DecodeResult:
        """The answer; see `Batcher.submit`."""
        return await self._batcher.submit(asked, rows=asked.width, deadline=deadline)

    async def run_exclusive(self, call: Callable[..., T], *args: object) -> T:
        """Call something between two searches, in the thread that searches."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *args)

    async def warm(self, asked: ResolvedRequest) -> None:
        """Search once, past the queue and the figures."""
        await self.run_exclusive(
            self._search, (asked.variant, batch_key(asked, asked.width)), [asked]
        )

    async def close(self) -> None:
        """Answer what waits and stop."""
        await self._batcher.close()
        self._thread.shutdown()

    def _plan(
        self, asked: ResolvedRequest, left_s: float
    ) -> BatchPlan[tuple[str, BatchKey]] | None:
        """The widest search of the request that ends in time."""
        least = min(asked.request.k, asked.width)
        pace = self._pace[asked.variant]
        width = pace.width(wanted=asked.width, least=least, left_s=left_s)
        if width is None or left_s <= 0:
            return None
        return BatchPlan((asked.variant, batch_key(asked, width)), width)

    async def _run(
        self, kind: tuple[str, BatchKey], batch: Sequence[ResolvedRequest], waited: Sequence[float]
    ) -> list[DecodeResult]:
        answers = await self.run_exclusive(self._search, kind, batch)
        rows, name = len(batch) * kind[1].width, kind[0]
        watch, seconds = answers[0].watch, answers[0].seconds
        self._pace[name].observe(rows, seconds)
        for one in waited:
            self._phase(name, "queue", one)
        self._phase(name, "prefill", watch.prefill_s)
        self._phase(name, "levels", watch.levels_s)
        self._phase(name, "post", max(0.0, seconds - watch.prefill_s - watch.levels_s))
        fill = min(1.0, rows / self._budget)
        self._meters.observe("orchard_serve_beam_fill", fill, variant=name)
        return answers

    def _search(
        self, kind: tuple[str, BatchKey], batch: Sequence[ResolvedRequest]
    ) -> list[DecodeResult]:
        began, slot, catalog_version = (
            time.monotonic(),
            self._slots[kind[0]],
            self._catalog_store.current,
        )
        slot.set_catalog(catalog_version.catalog)
        watching = _Watching(slot.holder, trace=kind[1].trace is not None)
        queries = [query_of(asked) for asked in batch]
        found, candidates = recommend(
            watching, catalog_version, queries, kind[1], max_history=self._max_history
        )
        self._check_legal(catalog_version, kind, queries, found)
        seconds = time.monotonic() - began
        return [
            DecodeResult(
                found=one, candidates=candidates, watch=watching.watch,
                catalog_version=catalog_version, policy=str(slot.version), width=kind[1].width,
                batch=len(batch), seconds=seconds,
            )
            for one in found
        ]  # fmt: skip

    def _check_legal(
        self,
        catalog_version: CatalogVersion,
        kind: tuple[str, BatchKey],
        queries: Sequence[Query],
        found: Sequence[RankedItems],
    ) -> None:
        """Count items that must not have been shown: a guard, for the search admits none."""
        offer = catalog_version.offer(kind[1].filters)
        for query, one in zip(queries, found, strict=True):
            ids = np.array([item.item_id for item in one.items], dtype=np.int64)
            row, known = catalog_version.catalog.find(ids)
            bad = ~known | ~offer.items[row] | np.isin(ids, query.exclude)
            if bad.any():
                self._meters.count("orchard_serve_illegal", by=float(bad.sum()), variant=kind[0])
                _log.error("%d illegal items in an answer of %s", int(bad.sum()), kind[0])

    def _phase(self, variant: str, phase: str, seconds: float) -> None:
        self._meters.observe("orchard_serve_phase_seconds", seconds, variant=variant, phase=phase)


class _Watching:
    """A runner whose next search is watched."""

    def __init__(self, runner: SearchRunner, *, trace: bool) -> None:
        self._runner, self._trace = runner, trace
        self.watch: Watched

    def run(
        self, find: Callable[[DecodingBackend, Prompts], Candidates], prompts: Prompts
    ) -> Candidates:
        """As the runner does, watched."""
        self.watch = Watched(find, trace=self._trace)
        return self._runner.run(self.watch, prompts)
