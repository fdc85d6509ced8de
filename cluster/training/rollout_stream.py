"""Run rollouts and rewards as one ordered, bounded stream of scored batches.

consumes     the prompts of each step, in the order of steps
waits for    a recent policy: step s starts once version s - max_lag has been released
produces     the scored trees of step 0, 1, 2, ... in that order
unblocked by `release`, which the main loop calls after every weight sync

With P prompts per step, at most (max_lag + 1) P prompts are in flight, and they are consumed in
order; so no tree of the batch that makes version s + 1 is older than version s - max_lag. With
max_lag = 0 step s + 1 starts only when all actors have version s + 1: the synchronous algorithm.

`groups_of_step` searches the prompts of a step. With `draw_groups` and `search_with_hints`, its
batch comes of more than one search of them. What these search depends only on the step and on
rewards, so a resumed run repeats it.

Shapes:  B prompts   R selected prompts
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Int64

from learner.advantage.estimators import teaching_groups
from orchard import arrays
from orchard.data.prompts import rows_of_step
from orchard.settings import Config, RolloutConfig
from orchard.types import Cost, PolicyVersion, ScoredTrees

Teaches = Callable[[ScoredTrees], Bool[np.ndarray, " B"]]
"""Function that marks the groups with an advantage."""


async def groups_of_step(
    step: int,
    config: Config,
    search: Callable[[Int64[np.ndarray, " R"], int, int], Awaitable[ScoredTrees]],
    *,
    num_rows: int,
) -> ScoredTrees:
    """Search and score the prompts of a 0-based step, in requests that run side by side.

    Args:
        step: step, which with the seed of the run determines the prompts of every draw.
        config: settings of the run.
        search: function that searches rows with a seed below a hint of so many codes, and scores
            what it finds.
        num_rows: number of training rows.
    """
    wanted, most = config.learner.prompts_per_step, config.learner.max_draws
    rows = rows_of_step(step, num_rows=num_rows, per_step=most * wanted, seed=config.seed)
    seed = config.seed * 1_000_003 + step
    size = request_size(config.rollout, wanted)

    def teaches(scored: ScoredTrees) -> Bool[np.ndarray, " B"]:
        return teaching_groups(scored, config.learner)

    async def request(part: Int64[np.ndarray, " R"]) -> ScoredTrees:
        return await search_with_hints(
            lambda some, hint: search(part[some], seed, hint),
            num_prompts=len(part),
            deepest=config.rollout.hints,
            teaches=teaches,
        )

    async def draw(number: int) -> ScoredTrees:
        begin, end = number * wanted, (number + 1) * wanted
        requests = [
            request(rows[start : min(start + size, end)]) for start in range(begin, end, size)
        ]
        return ScoredTrees.concatenate(await asyncio.gather(*requests))

    return await draw_groups(draw, wanted=wanted, most=most, teaches=teaches)


def request_size(rollout: RolloutConfig, num_prompts: int) -> int:
    """Return the number of prompts of a request, below `batch_size` if all actors are busy then."""
    return min(rollout.batch_size, -(-num_prompts // rollout.actors))


async def draw_groups(
    draw: Callable[[int], Awaitable[ScoredTrees]], *, wanted: int, most: int, teaches: Teaches
) -> ScoredTrees:
    """Draw groups until `wanted` of them teach, at most `most` times (dynamic sampling).

    DAPO (arXiv 2503.14476, eq. 11) draws until a batch is full of groups with a spread of rewards.
    Here the draws are bounded: where too few groups teach, the first others fill the batch, so its
    size is always `wanted`. Groups keep the order in which they were drawn. The cost is that of all
    searches, and counts the groups that were `drawn` and those of them that are `teaching`.

    Args:
        draw: function that searches and scores the prompts of the n-th draw, n from 0.
        wanted: number of groups of the batch.
        most: largest number of draws; with 1, the first draw is returned unchanged.
        teaches: function that marks the groups that teach.
    """
    scored = await draw(0)
    if most == 1:
        return scored
    parts, marks = [scored], [teaches(scored)]
    while len(parts) < most and sum(int(mark.sum()) for mark in marks) < wanted:
        parts.append(await draw(len(parts)))
        marks.append(teaches(parts[-1]))
    is_teaching = np.concatenate(marks)
    kept = np.sort(np.argsort(~is_teaching, kind="stable")[:wanted])
    counts = {"drawn": len(is_teaching), "teaching": int(is_teaching.sum())}
    return _counting(arrays.select(ScoredTrees.concatenate(parts), kept), counts)


async def search_with_hints(
    search: Callable[[Int64[np.ndarray, " R"], int], Awaitable[ScoredTrees]],
    *,
    num_prompts: int,
    deepest: int,
    teaches: Teaches,
) -> ScoredTrees:
    """Search prompts, and again below a longer and longer hint where a group does not teach.

    Each prompt keeps the group of the shortest hint with which it teaches, or that without a hint
    (HCGRec, arXiv 2608.11980). The cost is that of all searches; with hints, it counts the searches
    of one prompt below a hint (`hint_searches`) and the groups that keep one (`hinted`).

    Args:
        search: function that searches and scores some of the prompts below a hint of so many codes.
        num_prompts: number of prompts.
        deepest: largest number of codes in a hint.
        teaches: function that marks the groups that teach.
    """
    scored = await search(np.arange(num_prompts), 0)
    if not deepest:
        return scored
    counts = {"hint_searches": 0, "hinted": 0}
    rows = np.flatnonzero(~teaches(scored))
    for codes in range(1, deepest + 1):
        if len(rows) == 0:
            break
        again = await search(rows, codes)
        is_better = teaches(again)
        chosen = np.arange(num_prompts)
        chosen[rows[is_better]] = num_prompts + np.flatnonzero(is_better)
        scored = arrays.select(ScoredTrees.concatenate([scored, again]), chosen)
        counts["hint_searches"] += len(rows)
        counts["hinted"] += int(is_better.sum())
        rows = rows[~is_better]
    return _counting(scored, counts)


def _counting(scored: ScoredTrees, counts: dict[str, int]) -> ScoredTrees:
    """Add counts to the cost of scored trees."""
    cost = scored.trees.cost + Cost(counts=counts)
    return replace(scored, trees=replace(scored.trees, cost=cost))


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
