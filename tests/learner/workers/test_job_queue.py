"""Test the job queue between the driver and the worker group, without either."""

import asyncio
import subprocess
import sys

import pytest

from learner.workers.job_queue import Job, JobQueue, Result
from orchard.errors import CheckpointError
from orchard.types import PolicyVersion, Update


def result(number: int, *, start: bool = False) -> Result:
    metrics = {} if start else {"kl": 0.0}
    update = Update(policy=PolicyVersion(step=number, digest=""), metrics=metrics)
    return Result(number=number, update=update)


def test_jobs_are_kept_until_the_second_checkpoint_after_them() -> None:
    async def scenario() -> None:
        queue = JobQueue()
        await queue.put_result(result(0, start=True))
        for number in range(1, 6):
            await queue.put_job(number, Job(kind="update"))
        await queue.put_result(result(1))
        await queue.put_result(result(2))
        await queue.checkpoint_listed(2)
        # The group died before Ray Train recorded its checkpoint, and starts from the beginning.
        await queue.put_result(result(0, start=True))
        assert (await queue.get_job(1, saved=0)).kind == "update"
        await queue.checkpoint_listed(2)
        assert (await queue.get_job(1, saved=0)).kind == "update"
        await queue.put_result(result(4))
        await queue.checkpoint_listed(4)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(queue.get_job(2, saved=0), 0.05)
        assert (await queue.get_job(3, saved=2)).kind == "update"
        assert (await queue.get_result(4)).restarts == 1

    asyncio.run(scenario())


def test_what_a_recovery_repeats_is_not_kept_and_shows_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("learner.workers.job_queue.time.monotonic", lambda: now)

    async def scenario() -> None:
        nonlocal now
        queue = JobQueue()
        for number in range(4):
            await queue.put_result(result(number, start=number == 0))
            assert (await queue.get_result(number)).update.policy.step == number
        now = 160.0
        assert await queue.idle_s() == 60.0
        for number in range(4):  # the group restarted from the beginning
            await queue.put_result(result(number, start=number == 0))
        assert await queue.idle_s() == 0.0
        now = 300.0
        assert await queue.idle_s() == 140.0
        await queue.report_progress()  # an update inside an epoch
        assert await queue.idle_s() == 0.0
        pending = asyncio.ensure_future(queue.get_result(-1))
        await asyncio.sleep(0)
        assert not pending.done()
        pending.cancel()
        await queue.put_result(result(4))
        assert (await queue.get_result(4)).restarts == 1

    asyncio.run(scenario())


def test_an_order_to_save_comes_before_the_next_job_and_again_after_a_restart() -> None:
    async def scenario() -> None:
        queue = JobQueue()
        await queue.put_job(1, Job(kind="update"))
        request = asyncio.ensure_future(queue.request_checkpoint(1))
        assert (await queue.get_job(1, saved=0)).kind == "update"
        assert (await queue.get_job(2, saved=0)).kind == "save"
        assert not request.done()
        await queue.state_copied(1)
        await request
        written = asyncio.ensure_future(queue.get_written(1))
        await asyncio.sleep(0)
        assert not written.done()
        await queue.checkpoint_written(1, "")
        assert await written == ""
        await queue.put_job(2, Job(kind="stop"))
        assert (await queue.get_job(2, saved=1)).kind == "stop"
        # A group that restarts from the beginning has to run and save job 1 once more.
        assert (await queue.get_job(1, saved=0)).kind == "update"
        assert (await queue.get_job(2, saved=0)).kind == "save"

    asyncio.run(scenario())


def test_the_first_outcome_of_a_checkpoint_that_is_written_twice_stays() -> None:
    async def scenario() -> None:
        queue = JobQueue()
        written = asyncio.ensure_future(queue.get_written(1))
        await queue.checkpoint_written(1, "No space left on device")
        assert await written == "No space left on device"
        await queue.checkpoint_written(1, "")  # by a restarted group
        assert await queue.get_written(1) == "No space left on device"

    asyncio.run(scenario())


def test_an_error_of_the_workers_answers_everything_that_waits_for_them() -> None:
    async def work() -> None:
        queue, error = JobQueue(), CheckpointError("it is cut short")
        started = asyncio.ensure_future(queue.get_result(-1))
        saved = asyncio.ensure_future(queue.request_checkpoint(1))
        await asyncio.sleep(0)
        await queue.put_error(error)
        assert await started is error
        await saved
        assert await queue.get_written(1) == "it is cut short"
        assert await queue.get_result(3) is error

    asyncio.run(work())


def test_the_newest_result_is_given_again_once_a_restarted_group_repeats_it() -> None:
    async def scenario() -> None:
        queue = JobQueue()
        for number in range(3):
            await queue.put_result(result(number, start=number == 0))
            await queue.get_result(number)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(queue.get_repeated(2), 0.05)
        waiting = asyncio.ensure_future(queue.get_repeated(2))
        await queue.put_result(result(0, start=True))
        await queue.put_result(result(1))
        await asyncio.sleep(0)
        assert not waiting.done()
        again = result(2)
        await queue.put_result(again)
        assert (await waiting) is again
        assert (await queue.get_repeated(2)) is again
        await queue.put_result(result(0, start=True))  # its weights went with the group before
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(queue.get_repeated(2), 0.05)
        await queue.put_result(again)
        await queue.put_result(result(3))
        await queue.get_result(3)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(queue.get_repeated(2), 0.05)

    asyncio.run(scenario())


@pytest.mark.slow
def test_the_queue_reads_what_passes_it_without_torch() -> None:
    code = (
        "import pickle, sys, learner.workers.job_queue; from orchard.types import *;"
        "pickle.loads(pickle.dumps(StoredTransfer(digest='', ref=None)));"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "set()"
