"""Where requests wait and are searched: one queue, one thread that searches, for all variants.

Between two searches the thread does other work that no search must see half done, such as a switch
of policies. Catalogues are switched by the search itself: it takes the shelf in use when it begins.
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
from rollout.engine.protocol import Engine, Runner
from serve.catalog.store import Shelf, Stock
from serve.decoding.batching import Batcher, Pace, Plan
from serve.decoding.recommender import Found, Kind, Query, recommend
from serve.decoding.request import Asked, kind_of, query_of
from serve.decoding.trace import Watched
from serve.metrics import Meters
from serve.policies.slot import Seat

_log = logging.getLogger("orchard.serve")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answered:
    """What a batch made of one request."""

    found: Found
    candidates: Candidates
    """Of the whole batch, as is what it cost."""
    watch: Watched
    shelf: Shelf
    policy: str
    width: int
    batch: int
    """Requests in it."""
    seconds: float


class Line:
    """The queue and the search. Belongs to one event loop."""

    def __init__(
        self,
        config: ServeConfig,
        seats: Mapping[str, Seat],
        stock: Stock,
        meters: Meters,
        *,
        max_history: int,
    ) -> None:
        """Search with the engines of `seats` in what `stock` has on its shelf."""
        self._seats, self._stock, self._meters = seats, stock, meters
        self._budget, self._max_history = config.budget, max_history
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decoder")
        self._pace = {name: Pace() for name in seats}
        self._batcher = Batcher[Asked, tuple[str, Kind], Answered](
            self._run, self._plan, budget=config.budget, queue=config.queue,
            linger_s=config.linger_ms / 1000,
        )  # fmt: skip

    @property
    def waiting_rows(self) -> int:
        """Beam rows in the queue."""
        return self._batcher.waiting_rows

    async def submit(self, asked: Asked, *, deadline: float = float("inf")) -> Answered:
        """The answer; see `Batcher.submit`."""
        return await self._batcher.submit(asked, rows=asked.width, deadline=deadline)

    async def between(self, call: Callable[..., T], *args: object) -> T:
        """Call something between two searches, in the thread that searches."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *args)

    async def warm(self, asked: Asked) -> None:
        """Search once, past the queue and the figures."""
        await self.between(self._search, (asked.variant, kind_of(asked, asked.width)), [asked])

    async def close(self) -> None:
        """Answer what waits and stop."""
        await self._batcher.close()
        self._thread.shutdown()

    def _plan(self, asked: Asked, left_s: float) -> Plan[tuple[str, Kind]] | None:
        """The widest search of the request that ends in time."""
        least = min(asked.request.k, asked.width)
        pace = self._pace[asked.variant]
        width = pace.width(wanted=asked.width, least=least, left_s=left_s)
        if width is None or left_s <= 0:
            return None
        return Plan((asked.variant, kind_of(asked, width)), width)

    async def _run(
        self, kind: tuple[str, Kind], batch: Sequence[Asked], waited: Sequence[float]
    ) -> list[Answered]:
        answers = await self.between(self._search, kind, batch)
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

    def _search(self, kind: tuple[str, Kind], batch: Sequence[Asked]) -> list[Answered]:
        began, seat, shelf = time.monotonic(), self._seats[kind[0]], self._stock.shelf
        seat.turn_to(shelf.catalogue)
        watching = _Watching(seat.holder, trace=kind[1].trace is not None)
        queries = [query_of(asked) for asked in batch]
        found, candidates = recommend(
            watching, shelf, queries, kind[1], max_history=self._max_history
        )
        self._check_legal(shelf, kind, queries, found)
        seconds = time.monotonic() - began
        return [
            Answered(
                found=one, candidates=candidates, watch=watching.watch, shelf=shelf,
                policy=str(seat.version), width=kind[1].width, batch=len(batch), seconds=seconds,
            )
            for one in found
        ]  # fmt: skip

    def _check_legal(
        self,
        shelf: Shelf,
        kind: tuple[str, Kind],
        queries: Sequence[Query],
        found: Sequence[Found],
    ) -> None:
        """Count items that must not have been shown: a guard, for the search admits none."""
        offer = shelf.offer(kind[1].filters)
        for query, one in zip(queries, found, strict=True):
            ids = np.array([item.item_id for item in one.items], dtype=np.int64)
            row, known = shelf.catalogue.find(ids)
            bad = ~known | ~offer.items[row] | np.isin(ids, query.exclude)
            if bad.any():
                self._meters.count("orchard_serve_illegal", by=float(bad.sum()), variant=kind[0])
                _log.error("%d illegal items in an answer of %s", int(bad.sum()), kind[0])

    def _phase(self, variant: str, phase: str, seconds: float) -> None:
        self._meters.observe("orchard_serve_phase_seconds", seconds, variant=variant, phase=phase)


class _Watching:
    """A runner whose next search is watched."""

    def __init__(self, runner: Runner, *, trace: bool) -> None:
        self._runner, self._trace = runner, trace
        self.watch: Watched

    def run(self, find: Callable[[Engine, Prompts], Candidates], prompts: Prompts) -> Candidates:
        """As the runner does, watched."""
        self.watch = Watched(find, trace=self._trace)
        return self._runner.run(self.watch, prompts)
