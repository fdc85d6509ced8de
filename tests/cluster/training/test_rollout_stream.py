import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.training.rollout_stream import RolloutStream
from orchard.types import PolicyVersion


def version(step: int) -> PolicyVersion:
    return PolicyVersion(step=step, digest="")


class World:
    """Fake rollout with the policy published at its start, and varying running times."""

    def __init__(self, delays: list[int]) -> None:
        self.delays, self.published, self.begun = delays, version(0), list[int]()

    async def rollout(self, step: int) -> Any:
        self.begun.append(step)
        policy = self.published
        for _ in range(self.delays[step % len(self.delays)]):
            await asyncio.sleep(0)
        return SimpleNamespace(step=step, policy=policy)


async def run(world: World, *, steps: int, max_lag: int, first: int = 0) -> list[tuple[int, int]]:
    """Return (step, lag) of every batch, with a publication after each."""
    world.published = version(first)
    stream = RolloutStream(world.rollout, first=first, last=steps, max_lag=max_lag)
    stream.start_allowed_by(world.published)
    seen: list[tuple[int, int]] = []
    async for trees in stream:
        in_flight = len(world.begun) - len(seen)
        assert in_flight <= max_lag + 1
        seen.append((trees.step, world.published.step - trees.policy.step))
        world.published = version(world.published.step + 1)
        stream.start_allowed_by(world.published)
    await stream.close()
    return seen


@pytest.mark.parametrize("max_lag", [0, 1, 3])
def test_batches_come_in_order_and_never_staler_than_the_bound(max_lag: int) -> None:
    seen = asyncio.run(run(World([5, 0, 9, 1]), steps=12, max_lag=max_lag))
    assert [step for step, _ in seen] == list(range(12))
    assert max(lag for _, lag in seen) == max_lag


def test_without_lag_every_batch_is_of_the_newest_policy() -> None:
    seen = asyncio.run(run(World([3]), steps=5, max_lag=0))
    assert [lag for _, lag in seen] == [0] * 5


def test_a_resumed_stream_begins_where_it_is_told() -> None:
    world = World([2])
    seen = asyncio.run(run(world, steps=9, max_lag=1, first=6))
    assert [step for step, _ in seen] == world.begun == [6, 7, 8]


def test_a_failed_rollout_is_raised_and_the_rest_is_cancelled() -> None:
    async def failing(step: int) -> Any:
        if step == 0:
            raise ValueError("broken")
        await asyncio.Event().wait()

    async def scenario() -> None:
        stream = RolloutStream(failing, first=0, last=3, max_lag=2)
        stream.start_allowed_by(version(0))
        with pytest.raises(ValueError, match="broken"):
            await anext(aiter(stream))
        await asyncio.wait_for(stream.close(), timeout=5)

    asyncio.run(scenario())


def test_a_stopped_stream_ends_at_once_whatever_is_running() -> None:
    async def scenario() -> list[int]:
        world, stop, seen = World([1, 10**9]), asyncio.Event(), list[int]()
        stream = RolloutStream(world.rollout, first=0, last=5, max_lag=0, stop=stop)
        stream.start_allowed_by(version(0))
        async for trees in stream:
            seen.append(trees.step)
            stream.start_allowed_by(version(1))
            asyncio.get_running_loop().call_later(0.01, stop.set)
        await stream.close()
        return seen

    assert asyncio.run(asyncio.wait_for(scenario(), 60)) == [0]
