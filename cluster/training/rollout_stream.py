"""Rollouts and rewards as one ordered, bounded stream of scored batches.

consumes     the prompts of each step, in the order of steps
waits for    a policy young enough: step s starts once version s - max_lag has been admitted
produces     the scored trees of step 0, 1, 2, ... in that order
unblocked by `admit`, which the main loop calls after every publication

With P prompts a step, at most (max_lag + 1) P prompts are in flight, and they are consumed in
order; so no tree of the batch that makes version s + 1 is older than version s - max_lag. With
max_lag = 0 step s + 1 starts only when version s + 1 is everywhere: the synchronous algorithm.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable

from orchard.types import PolicyVersion, ScoredTrees


class RolloutStream:
    """Scored batches in order. Use from one event loop; `close` when done."""

    def __init__(
        self,
        rollout: Callable[[int], Awaitable[ScoredTrees]],
        *,
        first: int,
        last: int,
        max_lag: int,
        stop: asyncio.Event | None = None,
    ) -> None:
        """Prepare the steps `first` up to but not including `last`; nothing runs before `admit`.

        Args:
            rollout: the scored trees of a 0-based step.
            first: step to begin with, the number of updates already done.
            last: where to end.
            max_lag: versions that a tree may be behind the update that uses it.
            stop: ends the stream, whatever is still running.
        """
        self._rollout, self._next, self._last, self._max_lag = rollout, first, last, max_lag
        self._stop = stop or asyncio.Event()
        self._running: deque[asyncio.Task[ScoredTrees]] = deque()

    def release(self, policy: PolicyVersion) -> None:
        """Start every step that this version is young enough for."""
        while self._next < self._last and self._next <= policy.step + self._max_lag:
            self._running.append(asyncio.ensure_future(self._rollout(self._next)))
            self._next += 1

    async def __aiter__(self) -> AsyncIterator[ScoredTrees]:
        """Each batch as soon as it and all before it are ready; ends early once `stop` is set."""
        stopped = asyncio.ensure_future(self._stop.wait())
        try:
            while self._running and not self._stop.is_set():
                first = self._running[0]
                await asyncio.wait({first, stopped}, return_when=asyncio.FIRST_COMPLETED)
                if self._stop.is_set():
                    return
                yield first.result()
                self._running.popleft()
        finally:
            stopped.cancel()

    async def close(self) -> None:
        """Cancel what is still running and wait until it is gone."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
