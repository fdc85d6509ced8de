"""First-come, first-served batching of requests by a budget of beam rows, with a bounded queue.

    submit -> wait -> plan -> batch of one kind -> run -> answer

A beam row is one beam of one request: the cost of a forward pass grows with rows, not with
requests. When the engine is free, the oldest request is planned, and all others of the same kind
join its batch until the budget is full. A request is planned only when its turn comes, so that the
time left until its deadline decides its width; requests canceled in the queue cost nothing.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from serve.errors import OverloadedError, UnavailableError

K = TypeVar("K", bound=Hashable)
Q = TypeVar("Q")
A = TypeVar("A")


@dataclass(frozen=True, slots=True)
class BatchPlan(Generic[K]):
    """Batch kind and beam rows of one request."""

    kind: K
    rows: int


@dataclass(slots=True, eq=False)
class _QueueEntry(Generic[Q, A]):
    """Request in the queue, with the future that its caller awaits."""

    request: Q
    rows: int
    since: float
    deadline: float
    answer: "asyncio.Future[A]" = field(repr=False)


class TooLateError(Exception):
    """Raised if no search can finish before the deadline."""


class Batcher(Generic[Q, K, A]):
    """Queue that runs requests in batches, one at a time. Belongs to one event loop."""

    def __init__(
        self,
        run: Callable[[K, Sequence[Q], Sequence[float]], Awaitable[Sequence[A]]],
        plan: Callable[[Q, float], BatchPlan[K] | None],
        *,
        budget: int,
        queue: int,
        linger_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create a batcher that calls `run(kind, requests, seconds waited)` for each batch.

        Args:
            run: runs a batch and returns one answer per request.
            plan: returns kind and rows of a request, given the seconds left until its deadline, or
                None if it is too late.
            budget: maximum beam rows of a batch; a larger request forms a batch alone.
            queue: maximum beam rows in the queue.
            linger_s: seconds to wait for more requests before a batch runs.
            clock: monotonic clock in seconds.
        """
        self._run, self._plan, self._clock = run, plan, clock
        self._budget, self._queue, self._linger_s = budget, queue, linger_s
        self._waiting: deque[_QueueEntry[Q, A]] = deque()
        self._rows = 0
        self._arrived = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._rows_per_s = 0.0
        self._closed = False

    @property
    def waiting_rows(self) -> int:
        """Number of beam rows in the queue."""
        return self._rows

    async def submit(self, request: Q, *, rows: int, deadline: float = float("inf")) -> A:
        """Queue a request and return its answer once its batch has run.

        Args:
            request: argument of `plan` and `run`.
            rows: beam rows that the request counts for in the queue.
            deadline: latest answer time on the batcher's clock.

        Raises:
            OverloadedError: the queue is full.
            TooLateError: the deadline cannot be kept.
            UnavailableError: the batcher is closing.
        """
        if self._closed:
            raise UnavailableError("the service is shutting down; ask another replica")
        if self._rows + rows > self._queue:
            raise OverloadedError(
                f"{self._rows} beam rows wait and {rows} more exceed the bound of {self._queue}; "
                "try again later, or with a narrower beam",
                retry_after_s=self._rows / self._rows_per_s if self._rows_per_s else 1.0,
            )
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        entry = _QueueEntry[Q, A](
            request, rows, self._clock(), deadline, asyncio.get_running_loop().create_future()
        )
        self._waiting.append(entry)
        self._rows += rows
        self._arrived.set()
        return await entry.answer

    async def close(self) -> None:
        """Stop accepting requests and answer those in the queue."""
        self._closed = True
        self._arrived.set()
        if self._worker is not None:
            await self._worker

    async def _work(self) -> None:
        """Run batches until the batcher is closed and its queue is empty."""
        while True:
            while not self._waiting:
                if self._closed:
                    return
                self._arrived.clear()
                await self._arrived.wait()
            if self._linger_s and not self._closed:
                await asyncio.sleep(self._linger_s)
            planned = self._next_batch()
            if planned is not None:
                await self._run_batch(*planned)
            else:
                await asyncio.sleep(0)

    def _next_batch(self) -> tuple[K, list[_QueueEntry[Q, A]]] | None:
        """Remove and return the next batch: the oldest viable request and others of its kind.

        Return None if no request in the queue can still be answered.
        """
        kind, total = None, 0
        batch: list[_QueueEntry[Q, A]] = []
        others: deque[_QueueEntry[Q, A]] = deque()
        now = self._clock()
        while self._waiting:
            entry = self._waiting.popleft()
            if entry.answer.done():  # canceled
                self._rows -= entry.rows
                continue
            try:
                plan = self._plan(entry.request, entry.deadline - now)
            except Exception as error:
                self._rows -= entry.rows
                entry.answer.set_exception(error)
                continue
            if plan is None:
                self._rows -= entry.rows
                entry.answer.set_exception(TooLateError())
                continue
            fits = not batch or (plan.kind == kind and total + plan.rows <= self._budget)
            if not fits:
                others.append(entry)
                if total >= self._budget:
                    break
                continue
            kind, total = plan.kind, total + plan.rows
            batch.append(entry)
            self._rows -= entry.rows
        others.extend(self._waiting)
        self._waiting = others
        return (kind, batch) if batch and kind is not None else None

    async def _run_batch(self, kind: K, batch: list[_QueueEntry[Q, A]]) -> None:
        """Run a batch, resolve its futures and update the measured throughput."""
        start_time = self._clock()
        waited = [start_time - entry.since for entry in batch]
        try:
            answers = await self._run(kind, [entry.request for entry in batch], waited)
        except Exception as error:
            for entry in batch:
                if not entry.answer.done():
                    entry.answer.set_exception(error)
            return
        seconds = max(self._clock() - start_time, 1e-6)
        rate = sum(entry.rows for entry in batch) / seconds
        self._rows_per_s = rate if not self._rows_per_s else 0.8 * self._rows_per_s + 0.2 * rate
        for entry, answer in zip(batch, answers, strict=True):
            if not entry.answer.done():
                entry.answer.set_result(answer)


class LatencyModel:
    """Latency of batches, seconds = a + b * rows, by exponentially weighted least squares."""

    def __init__(self, forget: float = 0.95) -> None:
        """Create an empty model; each observation scales the weight of earlier ones by `forget`."""
        self._forget = forget
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def observe(self, rows: int, seconds: float) -> None:
        """Add the measured seconds of one batch."""
        self._n, self._x, self._y, self._xx, self._xy = (
            self._forget * old + new
            for old, new in (
                (self._n, 1.0), (self._x, rows), (self._y, seconds), (self._xx, rows * rows),
                (self._xy, rows * seconds),
            )
        )  # fmt: skip

    def seconds(self, rows: int) -> float:
        """Return the predicted seconds of a batch, 0 before the first observation."""
        if self._n == 0:
            return 0.0
        # Weighted sum of squared deviations of the rows from their mean.
        spread = self._xx - self._x * self._x / self._n
        slope = 0.0
        if spread > 1e-9 * self._xx:
            slope = max(0.0, (self._xy - self._x * self._y / self._n) / spread)
        return max(0.0, (self._y - slope * self._x) / self._n + slope * rows)

    def width(self, *, wanted: int, least: int, left_s: float) -> int | None:
        """Return the largest of `wanted`, `wanted / 2`, ... that finishes in `left_s` seconds.

        The width is at least `least`; return None if even that is too slow.
        """
        width = wanted
        while self.seconds(width) > left_s:
            if width <= least:
                return None
            width = max(least, width // 2)
        return width
