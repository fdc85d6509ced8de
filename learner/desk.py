"""Jobs for the learner's workers and what becomes of them, by number. An actor in `learner.train`.

A worker group that is started again asks for the jobs since its checkpoint once more.
"""

import asyncio
from dataclasses import dataclass, replace
from typing import Any, Literal

from orchard.types import PolicyVersion, Update
from orchard.weights import Weights


@dataclass(frozen=True, kw_only=True)
class Job:
    """Something for the whole worker group to do."""

    kind: Literal["epoch", "update", "stop"]
    batch: tuple[Any, ...] = ()
    """The object reference of an update's batch, in a tuple: a bare one would be fetched here."""
    save: bool = False
    """Write a checkpoint once the job is done; before the workers leave, where it is to stop."""
    judged: bool = True
    """Also hand back the weights that are evaluated and kept."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a job left behind; job 0 is the start itself."""

    number: int
    update: Update
    weights: Weights
    """To search with from now on."""
    kept: tuple[PolicyVersion, Weights] | None
    """To evaluate and keep, where those are others and were asked for."""
    saved: bool
    restarts: int = 0
    """Times that the group was started again, as the desk has counted them."""


class Desk:
    """Where jobs wait for the workers and results for the driver."""

    def __init__(self) -> None:
        """An empty desk."""
        self._jobs: dict[int, Job] = {}
        self._results: dict[int, Result] = {}
        self._starts = 0
        self._newest = 0
        """Number of the newest job after which a checkpoint was written."""
        self._changed = asyncio.Condition()

    async def post(self, number: int, job: Job) -> None:
        """Offer a job."""
        async with self._changed:
            self._jobs[number] = job
            self._changed.notify_all()

    async def fetch(self, number: int) -> Job:
        """The job of that number, as soon as there is one; lives no longer than the driver."""
        async with self._changed:
            await self._changed.wait_for(lambda: number in self._jobs)
            return self._jobs[number]

    async def deliver(self, result: Result) -> None:
        """Hand in a result; repeats after a restart change nothing."""
        async with self._changed:
            self._starts += not result.update.metrics
            self._results.setdefault(result.number, result)
            # A group that dies right after a checkpoint may come back from the one before it.
            if result.saved and result.number > self._newest:
                self._jobs = {n: job for n, job in self._jobs.items() if n > self._newest}
                self._newest = result.number
            self._changed.notify_all()

    async def collect(self, number: int) -> Result:
        """The result of that number, once; `-1` asks for the oldest there is (the start)."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: number in self._results or (number < 0 and bool(self._results))
            )
            found = self._results.pop(number if number >= 0 else min(self._results))
            return replace(found, restarts=self._starts - 1)
