"""Batching with an engine that the test blocks and releases."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.decoding.batching import Batcher, BatchPlan, LatencyModel, TooLateError
from serve.errors import OverloadedError, UnavailableError


class BlockedBatcher:
    """Batcher with a blocked engine, and the batches that the engine received."""

    def __init__(self, **settings: Any) -> None:
        self.batches: list[tuple[str, list[str]]] = []
        self.gate = asyncio.Event()
        self.now = 0.0
        self.rows = 4
        self.batcher: Batcher[str, str, str] = Batcher(
            self.run, self.plan, **({"budget": 8, "queue": 20} | settings), clock=lambda: self.now
        )

    def plan(self, request: str, left_s: float) -> BatchPlan[str] | None:
        return BatchPlan(request[0], self.rows) if left_s >= 1 else None

    async def run(self, kind: str, requests: Sequence[str], waited: Sequence[float]) -> list[str]:
        await self.gate.wait()
        self.batches.append((kind, list(requests)))
        if "boom" in requests[0]:
            raise RuntimeError("boom")
        return [request.upper() for request in requests]

    def ask(self, request: str, **how: Any) -> "asyncio.Task[str]":
        return asyncio.create_task(self.batcher.submit(request, rows=self.rows, **how))


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_a_batch_is_of_one_kind_within_the_budget_and_in_order_of_arrival() -> None:
    async def work() -> None:
        blocked = BlockedBatcher()
        first = blocked.ask("a0")
        await settle()  # the engine is busy with it
        rest = [blocked.ask(r) for r in ("a1", "b1", "a2", "a3")]
        await settle()
        blocked.gate.set()
        assert await asyncio.gather(first, *rest) == ["A0", "A1", "B1", "A2", "A3"]
        assert blocked.batches == [("a", ["a0"]), ("a", ["a1", "a2"]), ("b", ["b1"]), ("a", ["a3"])]
        assert blocked.batcher.waiting_rows == 0
        await blocked.batcher.close()

    asyncio.run(work())


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    async def work() -> None:
        blocked = BlockedBatcher(queue=8)
        tasks = [blocked.ask("a0")]
        await settle()
        tasks += [blocked.ask("a1"), blocked.ask("a2")]
        await settle()
        with pytest.raises(OverloadedError, match="8 beam rows wait and 4 more") as refusal:
            await blocked.batcher.submit("a3", rows=4)
        assert refusal.value.retry_after_s is not None
        assert refusal.value.retry_after_s > 0
        blocked.gate.set()
        await asyncio.gather(*tasks)
        assert await blocked.batcher.submit("a4", rows=4) == "A4"
        await blocked.batcher.close()

    asyncio.run(work())


def test_what_is_cancelled_is_never_searched() -> None:
    async def work() -> None:
        blocked = BlockedBatcher()
        first = blocked.ask("a0")
        await settle()
        canceled, kept = blocked.ask("a1"), blocked.ask("a2")
        await settle()
        canceled.cancel()
        blocked.gate.set()
        assert await kept == "A2"
        await first
        assert all("a1" not in batch for _, batch in blocked.batches)
        assert blocked.batcher.waiting_rows == 0
        await blocked.batcher.close()

    asyncio.run(work())


def test_a_deadline_that_passes_in_the_queue_raises_at_the_next_batch() -> None:
    async def work() -> None:
        blocked = BlockedBatcher()
        first, late = blocked.ask("a0"), blocked.ask("a1", deadline=5.0)
        await settle()
        third = blocked.ask("a2", deadline=5.0)
        await settle()
        blocked.now = 4.5
        blocked.gate.set()
        assert (await first, await late) == ("A0", "A1")  # both were in the first batch
        with pytest.raises(TooLateError):
            await third
        await blocked.batcher.close()

    asyncio.run(work())


def test_an_error_of_the_engine_fails_its_batch_and_no_other() -> None:
    async def work() -> None:
        blocked = BlockedBatcher()
        blocked.gate.set()
        with pytest.raises(RuntimeError, match="boom"):
            await blocked.ask("a-boom")
        assert await blocked.ask("a1") == "A1"
        await blocked.batcher.close()
        with pytest.raises(UnavailableError, match="shutting down"):
            await blocked.batcher.submit("a2", rows=1)

    asyncio.run(work())


@settings(max_examples=30)
@given(
    kinds=st.lists(st.sampled_from("abc"), min_size=1, max_size=40),
    rows=st.integers(1, 10),
    budget=st.integers(1, 30),
)
def test_everything_is_answered_once_whatever_arrives(
    kinds: list[str], rows: int, budget: int
) -> None:
    async def work() -> None:
        blocked = BlockedBatcher(budget=budget, queue=1000)
        blocked.rows = rows
        blocked.gate.set()
        requests = [f"{kind}{index}" for index, kind in enumerate(kinds)]
        assert await asyncio.gather(*map(blocked.ask, requests)) == [r.upper() for r in requests]
        for kind, batch in blocked.batches:
            assert {request[0] for request in batch} == {kind}
            assert len(batch) * rows <= max(budget, rows)
        await blocked.batcher.close()

    asyncio.run(work())


def test_the_latency_model_narrows_searches_that_would_be_late() -> None:
    latency = LatencyModel()
    assert latency.width(wanted=50, least=10, left_s=0.0) == 50  # nothing is known yet
    for rows in (10, 50, 100, 20, 80):
        latency.observe(rows, 0.01 + 0.001 * rows)
    assert latency.seconds(200) == pytest.approx(0.21)
    assert latency.width(wanted=64, least=10, left_s=1.0) == 64
    assert latency.width(wanted=64, least=10, left_s=0.03) == 16
    assert latency.width(wanted=64, least=10, left_s=0.021) == 10
    assert latency.width(wanted=64, least=10, left_s=0.015) is None
