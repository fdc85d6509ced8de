"""The desk between the driver and the worker group, without either."""

import asyncio

import pytest

from learner.desk import Desk, Job, Result
from orchard.types import PolicyVersion, Update


def result(number: int, *, saved: bool = False, start: bool = False) -> Result:
    metrics = {} if start else {"kl": 0.0}
    update = Update(policy=PolicyVersion(step=number, digest=""), metrics=metrics)
    return Result(number=number, update=update, weights={}, kept=None, saved=saved)


def test_jobs_are_kept_until_the_second_checkpoint_after_them() -> None:
    async def scenario() -> None:
        desk = Desk()
        await desk.deliver(result(0, start=True))
        for number in range(1, 6):
            await desk.post(number, Job(kind="update"))
        for number in (1, 2):
            await desk.deliver(result(number, saved=number == 2))
        # The group died before Ray Train took note of its checkpoint, and begins anew.
        await desk.deliver(result(0, start=True))
        assert (await desk.fetch(1)).kind == "update"
        await desk.deliver(result(2, saved=True))
        assert (await desk.fetch(1)).kind == "update"
        await desk.deliver(result(4, saved=True))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(desk.fetch(2), 0.05)
        assert (await desk.fetch(3)).kind == "update"
        assert (await desk.collect(4)).restarts == 1

    asyncio.run(scenario())
