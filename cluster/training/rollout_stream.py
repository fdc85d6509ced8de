"""Run rollouts and rewards as one ordered, bounded stream of scored batches.

consumes     the prompts of each step, in the order of steps
waits for    a recent policy: step s starts once version s - max_lag has been released
produces     the scored trees of step 0, 1, 2, ... in that order
unblocked by `release`, which the main loop calls after every weight sync

With P prompts per step, at most (max_lag + 1) P prompts are in flight, and they are consumed in
order; so no tree of the batch that makes version s + 1 is older than version s - max_lag. With
max_lag = 0 step s + 1 starts only when all actors have version s + 1: the synchronous algorithm.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable

from orchard.types import PolicyVersion, ScoredTrees


class RolloutStream:
    """Ordered stream of scored batches, for one event loop; `close` it when done."""

    def __init__(
        self,
        rollout: Callable[[int], Awaitable[ScoredTrees]],
        *,
        first: int,
        last: int,
        max_lag: int,
        stop: asyncio.Event | None = None,
    ) -> None:
        """Prepare the steps `first` up to but not including `last`; `release` starts them.

        Args:
            rollout: function that returns the scored trees of a 0-based step.
            first: first step, the number of updates already done.
            last: end of the steps, exclusive.
            max_lag: versions that a tree may be behind the update that uses it.
            stop: event that ends the stream, even while steps are running.
        """
        self._rollout, self._next, self._last, self._max_lag = rollout, first, last, max_lag
        self._stop = stop or asyncio.Event()
        self._running: deque[asyncio.Task[ScoredTrees]] = deque()

    def start_allowed_by(self, policy: PolicyVersion) -> None:
        """Start every step whose lag bound this version satisfies."""
        while self._next < self._last and self._next <= policy.step + self._max_lag:
            self._running.append(asyncio.ensure_future(self._rollout(self._next)))
            self._next += 1

    async def __aiter__(self) -> AsyncIterator[ScoredTrees]:
        """Yield each batch when it and all before it are ready; end early once `stop` is set."""
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
        """Cancel all running steps and wait until they have ended."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
