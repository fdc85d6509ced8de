"""Jobs for the learner's workers and what becomes of them, by number.

An actor in `learner.ray_trainer`.

A worker group that is started again asks for the jobs since its checkpoint once more, and so meets
every order to write one again, too.
"""

import asyncio
import time
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32

from orchard.policy.weights import Weights
from orchard.types import PolicyVersion, Update


@dataclass(frozen=True, kw_only=True)
class Job:
    """Something for the whole worker group to do."""

    kind: Literal["epoch", "update", "save", "stop"]
    batch: tuple[Any, ...] = ()
    """The object reference of an update's batch, in a tuple: a bare one would be fetched here."""
    needs_eval: bool = True
    """Also hand back the weights that are evaluated and kept."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a job left behind; job 0 is the start itself."""

    number: int
    update: Update
    weights: Weights
    """To search with from now on."""
    eval_weights: tuple[PolicyVersion, Weights] | None
    """To evaluate and keep, where those are others and were asked for."""
    probe_logprobs: Float32[np.ndarray, " B"] | None = None
    """Log-probabilities of the probe's answers under `weights`, where there is a probe."""
    restarts: int = 0
    """Times that the group was started again, as the desk has counted them."""


class JobQueue:
    """Where jobs wait for the workers and results for the driver."""

    def __init__(self) -> None:
        """An empty desk."""
        self._jobs: dict[int, Job] = {}
        self._orders: set[int] = set()
        """Jobs after which a checkpoint is to be written."""
        self._results: dict[int, Result] = {}
        self._collected = -1
        """Number of the newest result that was collected."""
        self._delivered = time.monotonic()
        self._starts = 0
        self._newest = 0
        """Number of the newest job after which a checkpoint was written."""
        self._refusal = ""
        self._changed = asyncio.Condition()

    async def put_job(self, number: int, job: Job) -> None:
        """Offer a job."""
        async with self._changed:
            self._jobs[number] = job
            self._changed.notify_all()

    async def get_job(self, number: int, *, saved: int) -> Job:
        """The job of that number, as soon as there is one; lives no longer than the driver.

        Before it comes the order to save, if there was one after the job before and the group's
        newest checkpoint, that of job `saved`, is older.
        """
        before = number - 1

        def ordered() -> bool:
            return before in self._orders and saved < before

        async with self._changed:
            await self._changed.wait_for(lambda: ordered() or number in self._jobs)
            return Job(kind="save") if ordered() else self._jobs[number]

    async def put_result(self, result: Result) -> None:
        """Hand in a result; repeats after a restart change nothing."""
        async with self._changed:
            self._starts += not result.update.metrics
            self._delivered = time.monotonic()
            if result.number > self._collected:  # nobody asks again for what was collected
                self._results.setdefault(result.number, result)
            self._changed.notify_all()

    async def get_result(self, number: int) -> Result:
        """The result of that number, once; `-1` asks for the oldest there is (the start)."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: number in self._results or (number < 0 and bool(self._results))
            )
            found = self._results.pop(number if number >= 0 else min(self._results))
            self._collected = max(self._collected, found.number)
            return replace(found, restarts=self._starts - 1)

    async def idle_s(self) -> float:
        """Seconds since anything was handed in, repeats included."""
        return time.monotonic() - self._delivered

    async def request_checkpoint(self, number: int) -> str:
        """Have the state after that job written; why it cannot be, or "" once it is."""
        async with self._changed:
            self._orders.add(number)
            self._changed.notify_all()
            await self._changed.wait_for(lambda: self._newest >= number or bool(self._refusal))
            return self._refusal

    async def checkpoint_done(self, number: int) -> None:
        """Tell that the state after that job is written."""
        async with self._changed:
            # A group that dies right after a checkpoint may come back from the one before it.
            if number > self._newest:
                self._jobs = {n: job for n, job in self._jobs.items() if n > self._newest}
                self._orders = {n for n in self._orders if n > self._newest}
                self._newest = number
            self._changed.notify_all()

    async def checkpoint_failed(self, reason: str) -> None:
        """Tell that the state cannot be written."""
        async with self._changed:
            self._refusal = reason
            self._changed.notify_all()
