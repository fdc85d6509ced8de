"""Load of HTTP servers: clients that keep their connections, at the same concurrency for all."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

CLIENTS = 16
"""Number of requests that a closed loop keeps in flight."""


@dataclass
class Load:
    """Latencies, failures and responses of the requests of one client."""

    seconds: list[float] = field(default_factory=list[float])
    failed: int = 0
    retried: int = 0
    in_flight: int = 0
    """Number of requests that have been sent and not been answered."""
    answers: list[tuple[float, Any]] = field(default_factory=list[tuple[float, Any]])
    """Time at which each request was sent, with its response."""

    def __add__(self, other: "Load") -> "Load":
        """Merge two loads."""
        return Load(
            seconds=self.seconds + other.seconds, failed=self.failed + other.failed,
            retried=self.retried + other.retried, in_flight=self.in_flight + other.in_flight,
            answers=self.answers + other.answers,
        )  # fmt: skip

    async def send(
        self, client: httpx.AsyncClient, path: str, body: dict[str, Any], *, retry: bool = False
    ) -> None:
        """Send a request and record its outcome; with `retry`, send a failed one once more."""
        start_s, sent_at = time.perf_counter(), time.time()
        for attempt in range(2 if retry else 1):
            self.in_flight += 1
            try:
                answer = await client.post(path, json=body)
                if answer.status_code == 200:
                    self.seconds.append(time.perf_counter() - start_s)
                    self.answers.append((sent_at, answer.json()))
                    return
            except httpx.HTTPError:
                pass
            finally:
                self.in_flight -= 1
            if retry and attempt == 0:
                self.retried += 1
        self.failed += 1


async def closed_loop(
    client: httpx.AsyncClient,
    path: str,
    bodies: Iterator[dict[str, Any]],
    seconds: float,
    *,
    load: Load | None = None,
    retry: bool = False,
) -> float:
    """Keep `CLIENTS` requests in flight for some seconds; return the answers per second."""
    load = Load() if load is None else load
    await Load().send(client, path, next(bodies))
    start_s = time.perf_counter()

    async def ask() -> None:
        while time.perf_counter() < start_s + seconds:
            await load.send(client, path, next(bodies), retry=retry)

    await asyncio.gather(*(ask() for _ in range(CLIENTS)))
    return len(load.seconds) / (time.perf_counter() - start_s)


async def measure_rival(
    folder: Path, way: str, width: int, port: int, histories: Sequence[list[int]], seconds: float
) -> dict[str, Any]:
    """Start a server of `benchmarks.shared.rival` and load it as the endpoint is.

    Returns its answers per second (`rate`) and its answers to the first histories (`answers`).
    """
    server = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.shared.rival", str(folder), str(port), str(width), way],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        url = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=url, timeout=120.0) as client:
            for _ in range(600):
                try:
                    await client.get("/docs")
                    break
                except httpx.HTTPError:
                    await asyncio.sleep(0.2)
            bodies = iter([{"history": history, "k": 10} for history in histories])
            rate = await closed_loop(client, "/recommend", bodies, seconds)
            answers = [
                (await client.post("/recommend", json={"history": history, "k": 200})).json()
                for history in histories[:20]
            ]
    finally:
        server.terminate()
        server.wait()
    return {"rate": rate, "answers": answers, "histories": histories[:20]}
