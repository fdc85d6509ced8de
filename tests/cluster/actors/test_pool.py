"""Pools over real actors that die, hang and raise on request."""

import asyncio
import os
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.actors.pool import Pool
from orchard.errors import ActorError, DataError, WeightMismatchError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@ray.remote(num_cpus=0)
class Worker:
    def __init__(self) -> None:
        self.version = 0

    def install(self, version: int) -> int:
        self.version = version
        return version

    def double(self, number: int) -> tuple[int, int]:
        return 2 * number, self.version

    def die_once(self, marker: str) -> str:
        if not Path(marker).exists():
            Path(marker).touch()
            os._exit(1)
        return "alive"

    def hang_once(self, marker: str) -> str:
        if not Path(marker).exists():
            Path(marker).touch()
            threading.Event().wait()
        return "awake"

    def hang(self) -> None:
        threading.Event().wait()

    def complain(self) -> None:
        raise DataError("row 3 is bad")

    def die(self) -> None:
        os._exit(1)

    def doubt(self) -> None:
        raise WeightMismatchError("2 nats from the learner's")


def pool(**changes: Any) -> Pool:
    settings: dict[str, Any] = {
        "size": 2,
        "queue": 2,
        "timeout_s": 60.0,
        "retries": 2,
        "max_restarts": 3,
        "start_timeout_s": 120.0,
    }
    return Pool("workers", lambda _: Worker.remote(), **settings | changes)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, timeout=300))


def test_every_call_is_answered_once_and_in_its_place() -> None:
    async def scenario() -> None:
        workers = pool()
        await workers.ready()
        results = await asyncio.gather(*(workers.call("double", n) for n in range(20)))
        assert [n for n, _ in results] == [2 * n for n in range(20)]
        workers.close()

    run(scenario())


def test_a_killed_actor_is_replaced_brought_up_to_date_and_nothing_is_lost(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        workers = pool(size=1)

        async def catch_up(actor: Any) -> None:
            await actor.install.remote(7)

        workers.on_start = catch_up
        assert await workers.broadcast("install", 7, timeout_s=60.0) == [7]
        others = [workers.call("double", n) for n in range(4)]
        results = await asyncio.gather(workers.call("die_once", str(tmp_path / "mark")), *others)
        assert results == ["alive", (0, 7), (2, 7), (4, 7), (6, 7)]
        assert workers.restarts == 1
        workers.close()

    run(scenario())


def test_a_hanging_actor_is_replaced_at_its_deadline(tmp_path: Path) -> None:
    async def scenario() -> None:
        workers = pool(size=1, timeout_s=10.0)
        await workers.ready()
        assert await workers.call("hang_once", str(tmp_path / "mark")) == "awake"
        assert workers.restarts == 1
        workers.close()

    run(scenario())


def test_complaints_are_passed_on_and_not_retried() -> None:
    async def scenario() -> None:
        workers = pool(size=1)
        with pytest.raises(DataError, match="row 3 is bad"):
            await workers.call("complain")
        assert workers.restarts == 0
        workers.close()

    run(scenario())


def test_an_unfit_actor_is_replaced_and_a_second_one_ends_the_run() -> None:
    async def scenario() -> None:
        workers = pool(size=1)
        with pytest.raises(WeightMismatchError, match="2 nats"):
            await workers.broadcast("doubt", timeout_s=60.0)
        assert workers.restarts == 1
        assert workers.failures["doubt", "unfit"] == 2

        async def catch_up(actor: Any) -> None:
            await actor.doubt.remote()

        workers.on_start = catch_up
        with pytest.raises(WeightMismatchError, match="2 nats"):
            await workers.broadcast("doubt", timeout_s=60.0)
        workers.close()

    run(scenario())


def test_an_actor_that_always_dies_ends_in_an_error_that_names_it() -> None:
    async def scenario() -> None:
        workers = pool(size=1, max_restarts=1)
        with pytest.raises(ActorError, match="workers actor 0 was lost"):
            await workers.call("die")
        workers.close()

    run(scenario())


def test_a_replacement_that_is_lost_as_well_ends_in_one_sentence() -> None:
    async def scenario() -> None:
        workers = pool(size=1, max_restarts=5)
        with pytest.raises(ActorError, match="workers actor 0, a replacement, failed die as well"):
            await workers.broadcast("die", timeout_s=60.0)
        with pytest.raises(ActorError, match="failed hang.* raise cluster.publish_timeout_s"):
            await workers.broadcast("hang", timeout_s=0.5)
        workers.close()

    run(scenario())


@ray.remote(num_cpus=0)
class Broken:
    def __init__(self) -> None:
        raise AttributeError("libnuma.so.1 is missing")


def test_an_actor_that_cannot_start_says_what_was_raised_at_last() -> None:
    async def scenario() -> None:
        broken = Pool(
            "workers", lambda _: Broken.remote(), size=1, queue=1, timeout_s=60.0, retries=0,
            max_restarts=0, start_timeout_s=120.0,
        )  # fmt: skip
        with pytest.raises(ActorError, match="AttributeError: libnuma.so.1 is missing; see"):
            await broken.ready()
        broken.close()

    run(scenario())
