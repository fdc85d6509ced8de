"""Actors in one process answer as actors of Ray do, and keep the traceback of an error."""

import asyncio
import traceback

import pytest

from cluster.actors.backend import IN_PROCESS, RAY, backend_of
from cluster.actors.pool import Pool
from orchard.settings import ClusterConfig


class Divider:
    def __init__(self, by: int) -> None:
        self.by = by

    def divide(self, number: int) -> float:
        return number / self.by


def pool(by: int) -> Pool:
    return Pool(
        "dividers",
        lambda index: IN_PROCESS.start(Divider, by, gpus=0.5),
        size=2,
        queue=1,
        timeout_s=10.0,
        retries=1,
        max_restarts=1,
        start_timeout_s=10.0,
        kill=IN_PROCESS.kill,
    )


def test_a_pool_in_one_process_calls_and_broadcasts() -> None:
    async def work() -> None:
        actors = pool(2)
        await actors.ready()
        assert await asyncio.gather(*(actors.call("divide", n) for n in range(4))) == [
            0,
            0.5,
            1,
            1.5,
        ]
        assert await actors.broadcast("divide", 3, timeout_s=10.0) == [1.5, 1.5]
        assert sum(actors.calls.values()) == 6
        actors.close()

    asyncio.run(work())


def test_an_error_in_one_process_is_the_one_that_was_raised() -> None:
    with pytest.raises(ZeroDivisionError) as info:
        asyncio.run(pool(0).call("divide", 1))
    assert "return number / self.by" in "".join(traceback.format_exception(info.value))


def test_the_setting_selects_the_backend() -> None:
    assert backend_of(ClusterConfig()) is RAY
    assert backend_of(ClusterConfig(in_process=True)) is IN_PROCESS
