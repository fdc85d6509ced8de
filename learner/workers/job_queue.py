"""Queue numbered jobs for the learner's workers and their results for the driver.

`learner.workers.trainer_handle` runs the queue as a Ray actor.

A restarted worker group requests the jobs since its checkpoint again, and so receives every request
for a checkpoint again, too.
"""

import asyncio
import time
from dataclasses import dataclass, replace
from typing import Any, Literal

from orchard.errors import OrchardError
from orchard.types import Update


@dataclass(frozen=True, kw_only=True)
class Job:
    """Unit of work for the whole worker group."""

    kind: Literal["epoch", "update", "save", "stop"]
    batch: tuple[Any, ...] = ()
    """Object reference of an update's batch, in a tuple: Ray would fetch a bare one here."""
    needs_eval: bool = True
    """Also return the weights to evaluate and keep."""
    written: int = 0
    """Number of the job whose checkpoint has been written, and is to be listed first."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Outcome of a job; job 0 is the start itself."""

    number: int
    update: Update
    restarts: int = 0
    """Number of restarts of the worker group, as the queue counted them."""


class JobQueue:
    """Queue of jobs for the workers and of results for the driver."""

    def __init__(self) -> None:
        """Create an empty queue."""
        self._jobs: dict[int, Job] = {}
        self._checkpoint_requests: set[int] = set()
        """Numbers of the jobs after which a checkpoint is to be written."""
        self._results: dict[int, Result] = {}
        self._collected = -1
        """Number of the newest result that was collected."""
        self._repeated: Result | None = None
        """Newest repeat of that result after a restart."""
        self._progressed = time.monotonic()
        """Time of the newest result, repeats included, or of an update inside an epoch."""
        self._starts = 0
        """Number of starts of the worker group."""
        self._newest_copy = 0
        """Number of the newest job after which the state was copied."""
        self._written: dict[int, str] = {}
        """By the number of the job, "" for a checkpoint that was written, or why it was not."""
        self._newest_checkpoint = 0
        """Number of the newest job after which a checkpoint was listed."""
        self._error: OrchardError | None = None
        """Error that ended the worker group, which a restart would only repeat."""
        self._changed = asyncio.Condition()

    async def put_job(self, number: int, job: Job) -> None:
        """Add a job under its number."""
        async with self._changed:
            self._jobs[number] = job
            self._changed.notify_all()

    async def get_job(self, number: int, *, saved: int) -> Job:
        """Wait for a job and return it.

        A pending checkpoint request comes first: if one was made after the previous job and the
        newest state that the group has copied, that after job `saved`, is older, this returns a job
        of kind "save".
        """
        previous = number - 1

        def save_first() -> bool:
            return previous in self._checkpoint_requests and saved < previous

        async with self._changed:
            await self._changed.wait_for(lambda: save_first() or number in self._jobs)
            return Job(kind="save") if save_first() else self._jobs[number]

    async def put_result(self, result: Result) -> None:
        """Add a result; of repeats after a restart, that of the newest one collected is kept."""
        async with self._changed:
            if not result.update.metrics:  # a start, with which the group before it has ended
                self._starts += 1
                self._repeated = None
            self._progressed = time.monotonic()
            if result.number > self._collected:  # a collected result is not requested again
                self._results.setdefault(result.number, result)
            elif result.number == self._collected:
                self._repeated = result
            self._changed.notify_all()

    async def put_error(self, error: OrchardError) -> None:
        """Record the error that ended the worker group."""
        async with self._changed:
            self._error = error
            self._changed.notify_all()

    async def get_result(self, number: int) -> Result | OrchardError:
        """Wait for a result and remove it; `-1` selects the oldest one (the start).

        Returns the error instead if it ended the worker group before the result.
        """
        async with self._changed:

            def there() -> bool:
                return number in self._results or (number < 0 and bool(self._results))

            await self._changed.wait_for(lambda: there() or self._error is not None)
            if self._error is not None and not there():
                return self._error
            result = self._results.pop(number if number >= 0 else min(self._results))
            self._collected = max(self._collected, result.number)
            self._repeated = None
            return replace(result, restarts=self._starts - 1)

    async def get_repeated(self, number: int) -> Result:
        """Wait until a restarted group has repeated the newest result, and return the repeat."""
        async with self._changed:
            while self._repeated is None or self._repeated.number != number:
                await self._changed.wait()
            return self._repeated

    async def report_progress(self) -> None:
        """Record that the workers are at work in an epoch, which may take hours."""
        self._progressed = time.monotonic()

    async def idle_s(self) -> float:
        """Return the seconds since the last result, repeats included, or reported progress."""
        return time.monotonic() - self._progressed

    async def request_checkpoint(self, number: int) -> None:
        """Request a checkpoint after a job, and wait until the state is copied for it."""
        async with self._changed:
            self._checkpoint_requests.add(number)
            self._changed.notify_all()
            await self._changed.wait_for(
                lambda: self._newest_copy >= number or self._error is not None
            )

    async def state_copied(self, number: int) -> None:
        """Record that the state after a job is copied and about to be written."""
        async with self._changed:
            self._newest_copy = max(self._newest_copy, number)
            self._changed.notify_all()

    async def checkpoint_written(self, number: int, reason: str) -> None:
        """Record that the checkpoint after a job is written (""), or why it cannot be.

        The first outcome stays where a restarted group writes it again: jobs may rely on it.
        """
        async with self._changed:
            self._written.setdefault(number, reason)
            self._changed.notify_all()

    async def get_written(self, number: int) -> str:
        """Wait until the checkpoint after a job is written; return "" or why it cannot be."""
        async with self._changed:
            await self._changed.wait_for(lambda: number in self._written or self._error is not None)
            return str(self._error) if self._error is not None else self._written[number]

    async def checkpoint_listed(self, number: int) -> None:
        """Record that a restart begins with the checkpoint after a job."""
        async with self._changed:
            # A group that dies right after a checkpoint may restart from the previous one.
            if number > self._newest_checkpoint:
                oldest = self._newest_checkpoint
                self._jobs = {n: job for n, job in self._jobs.items() if n > oldest}
                self._checkpoint_requests = {n for n in self._checkpoint_requests if n > oldest}
                self._newest_checkpoint = number
            self._changed.notify_all()
