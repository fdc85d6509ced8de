"""Batches by a budget of beam rows, first come first served, with a bounded queue.

    submit -> wait -> plan -> batch of one kind -> run -> answer

A beam row is one beam of one request: what a forward pass of the engine costs grows with rows, not
with requests. When the engine is free the oldest request is planned, and all others of its kind
join it until the budget is full. A request is planned when its turn has come, so that what is left
of its deadline decides its width; requests that were cancelled meanwhile cost nothing.
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
    """What a request is to be searched with."""

    kind: K
    rows: int


@dataclass(slots=True, eq=False)
class _Waiting(Generic[Q, A]):
    request: Q
    rows: int
    since: float
    deadline: float
    answer: "asyncio.Future[A]" = field(repr=False)


class TooLateError(Exception):
    """The deadline is nearer than any search could end."""


class Batcher(Generic[Q, K, A]):
    """Runs requests in batches, one batch at a time. Belongs to one event loop."""

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
        """Call `run(kind, requests, seconds waited)` for each batch.

        Args:
            run: answers a batch; one answer per request.
            plan: kind and rows of a request, given the seconds left; None where it is too late.
            budget: beam rows that a batch may hold; a larger request is a batch of its own.
            queue: beam rows that may wait.
            linger_s: time that a batch waits for company once the engine is free.
            clock: monotonic seconds.
        """
        self._run, self._plan, self._clock = run, plan, clock
        self._budget, self._queue, self._linger_s = budget, queue, linger_s
        self._waiting: deque[_Waiting[Q, A]] = deque()
        self._rows = 0
        self._arrived = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._rows_per_s = 0.0
        self._closed = False

    @property
    def waiting_rows(self) -> int:
        """Beam rows in the queue."""
        return self._rows

    async def submit(self, request: Q, *, rows: int, deadline: float = float("inf")) -> A:
        """The answer, once the request has been in a batch.

        Args:
            request: what `plan` and `run` take.
            rows: beam rows that it takes of the queue's bound.
            deadline: on the batcher's clock.

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
        one = _Waiting[Q, A](
            request, rows, self._clock(), deadline, asyncio.get_running_loop().create_future()
        )
        self._waiting.append(one)
        self._rows += rows
        self._arrived.set()
        return await one.answer

    async def close(self) -> None:
        """Answer what waits, take nothing more."""
        self._closed = True
        self._arrived.set()
        if self._worker is not None:
            await self._worker

    async def _work(self) -> None:
        while True:
            while not self._waiting:
                if self._closed:
                    return
                self._arrived.clear()
                await self._arrived.wait()
            if self._linger_s and not self._closed:
                await asyncio.sleep(self._linger_s)
            planned = self._next()
            if planned is not None:
                await self._answer(*planned)
            else:
                await asyncio.sleep(0)

    def _next(self) -> tuple[K, list[_Waiting[Q, A]]] | None:
        """Take the oldest request that can still be answered, and all of its kind that fit."""
        kind, total = None, 0
        batch: list[_Waiting[Q, A]] = []
        others: deque[_Waiting[Q, A]] = deque()
        now = self._clock()
        while self._waiting:
            one = self._waiting.popleft()
            if one.answer.done():  # cancelled
                self._rows -= one.rows
                continue
            try:
                plan = self._plan(one.request, one.deadline - now)
            except Exception as error:
                self._rows -= one.rows
                one.answer.set_exception(error)
                continue
            if plan is None:
                self._rows -= one.rows
                one.answer.set_exception(TooLateError())
                continue
            fits = not batch or (plan.kind == kind and total + plan.rows <= self._budget)
            if not fits:
                others.append(one)
                if total >= self._budget:
                    break
                continue
            kind, total = plan.kind, total + plan.rows
            batch.append(one)
            self._rows -= one.rows
        others.extend(self._waiting)
        self._waiting = others
        return (kind, batch) if batch and kind is not None else None

    async def _answer(self, kind: K, batch: list[_Waiting[Q, A]]) -> None:
        began = self._clock()
        waited = [began - one.since for one in batch]
        try:
            answers = await self._run(kind, [one.request for one in batch], waited)
        except Exception as error:
            for one in batch:
                if not one.answer.done():
                    one.answer.set_exception(error)
            return
        seconds = max(self._clock() - began, 1e-6)
        rate = sum(one.rows for one in batch) / seconds
        self._rows_per_s = rate if not self._rows_per_s else 0.8 * self._rows_per_s + 0.2 * rate
        for one, answer in zip(batch, answers, strict=True):
            if not one.answer.done():
                one.answer.set_result(answer)


class LatencyModel:
    """How long batches take: seconds = a + b * rows, by least squares that forget."""

    def __init__(self, forget: float = 0.95) -> None:
        """`forget` is what an observation is worth after each further one."""
        self._forget = forget
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def observe(self, rows: int, seconds: float) -> None:
        """Learn from a batch."""
        self._n, self._x, self._y, self._xx, self._xy = (
            self._forget * old + new
            for old, new in (
                (self._n, 1.0), (self._x, rows), (self._y, seconds), (self._xx, rows * rows),
                (self._xy, rows * seconds),
            )
        )  # fmt: skip

    def seconds(self, rows: int) -> float:
        """What a batch of so many rows should take; 0 while nothing is known."""
        if self._n == 0:
            return 0.0
        spread = self._xx - self._x * self._x / self._n
        slope = 0.0
        if spread > 1e-9 * self._xx:
            slope = max(0.0, (self._xy - self._x * self._y / self._n) / spread)
        return max(0.0, (self._y - slope * self._x) / self._n + slope * rows)

    def width(self, *, wanted: int, least: int, left_s: float) -> int | None:
        """The widest of wanted, half of it, ... that ends in time, at least `least`; else None."""
        width = wanted
        while self.seconds(width) > left_s:
            if width <= least:
                return None
            width = max(least, width // 2)
        return width
