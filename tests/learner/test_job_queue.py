"""The desk between the driver and the worker group, without either."""

import asyncio

import pytest

from learner.job_queue import Job, JobQueue, Result
from orchard.types import PolicyVersion, Update


def result(number: int, *, start: bool = False) -> Result:
    metrics = {} if start else {"kl": 0.0}
    update = Update(policy=PolicyVersion(step=number, digest=""), metrics=metrics)
    return Result(number=number, update=update, weights={}, eval_weights=None)


def test_jobs_are_kept_until_the_second_checkpoint_after_them() -> None:
    async def scenario() -> None:
        desk = JobQueue()
        await desk.put_result(result(0, start=True))
        for number in range(1, 6):
            await desk.put_job(number, Job(kind="update"))
        await desk.put_result(result(1))
        await desk.put_result(result(2))
        await desk.checkpoint_done(2)
        # The group died before Ray Train took note of its checkpoint, and begins anew.
        await desk.put_result(result(0, start=True))
        assert (await desk.get_job(1, saved=0)).kind == "update"
        await desk.checkpoint_done(2)
        assert (await desk.get_job(1, saved=0)).kind == "update"
        await desk.put_result(result(4))
        await desk.checkpoint_done(4)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(desk.get_job(2, saved=0), 0.05)
        assert (await desk.get_job(3, saved=2)).kind == "update"
        assert (await desk.get_result(4)).restarts == 1

    asyncio.run(scenario())


def test_what_a_recovery_repeats_is_not_kept_and_shows_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("learner.job_queue.time.monotonic", lambda: now)

    async def scenario() -> None:
        nonlocal now
        desk = JobQueue()
        for number in range(4):
            await desk.put_result(result(number, start=number == 0))
            assert (await desk.get_result(number)).update.policy.step == number
        now = 160.0
        assert await desk.idle_s() == 60.0
        for number in range(4):  # the group came back from the start
            await desk.put_result(result(number, start=number == 0))
        assert await desk.idle_s() == 0.0
        asked = asyncio.ensure_future(desk.get_result(-1))
        await asyncio.sleep(0)
        assert not asked.done()
        asked.cancel()
        await desk.put_result(result(4))
        assert (await desk.get_result(4)).restarts == 1

    asyncio.run(scenario())


def test_an_order_to_save_comes_before_the_next_job_and_again_after_a_restart() -> None:
    async def scenario() -> None:
        desk = JobQueue()
        await desk.put_job(1, Job(kind="update"))
        ordered = asyncio.ensure_future(desk.request_checkpoint(1))
        assert (await desk.get_job(1, saved=0)).kind == "update"
        assert (await desk.get_job(2, saved=0)).kind == "save"
        assert not ordered.done()
        await desk.checkpoint_done(1)
        assert await ordered == ""
        await desk.put_job(2, Job(kind="stop"))
        assert (await desk.get_job(2, saved=1)).kind == "stop"
        # A group that came back from the start has job 1 to do and to save once more.
        assert (await desk.get_job(1, saved=0)).kind == "update"
        assert (await desk.get_job(2, saved=0)).kind == "save"

    asyncio.run(scenario())


def test_a_storage_that_takes_nothing_ends_the_order_with_its_reason() -> None:
    async def scenario() -> None:
        desk = JobQueue()
        ordered = asyncio.ensure_future(desk.request_checkpoint(1))
        await desk.checkpoint_failed("No space left on device")
        assert await ordered == "No space left on device"

    asyncio.run(scenario())
