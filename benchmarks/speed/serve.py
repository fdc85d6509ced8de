"""Benchmark the endpoint: overhead, throughput, a baseline server, changes and failure under load.

All is measured over real HTTP against replicas on Ray Serve, except the overhead over the bare
search: that is one request at a time through the whole application, without a socket and without
Ray, minus the search time reported by the endpoint. The baseline is a FastAPI server around
Hugging Face's beam search with the same model, width and items.

Client, proxy, replicas and other processes share the cores of the machine: figures are those of the
smallest deployment, and only ratios within one run are meaningful.
"""

import asyncio
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import ray
from ray import serve as ray_serve

from benchmarks.shared.measure import Report, Row, figure, report
from benchmarks.speed.learner import Setting, default_setting
from cluster.actors.session import ray_session
from cluster.cli import serving
from orchard.catalog import catalog as catalogs
from orchard.policy import weights
from orchard.settings import ClusterConfig, ServeConfig
from orchard.testing import TinySetup, tiny_prompts
from serve.app import Arguments
from serve.factory import open_service
from serve.metrics import InMemoryMetrics
from serve.schema import RecommendRequest
from serve.service import Service
from serve.testing import export_policy

WIDTH, HISTORY, TOKEN, TURNS = 50, 10, "bench", 3
PORT, RIVAL_PORT = 8765, 8766


@dataclass
class Load:
    """Latencies, failures and responses of the requests of one client."""

    seconds: list[float] = field(default_factory=list[float])
    failed: int = 0
    retried: int = 0
    answers: list[tuple[float, dict[str, Any]]] = field(
        default_factory=list[tuple[float, dict[str, Any]]]
    )
    """Time at which each request was sent, with its response."""

    def __add__(self, other: "Load") -> "Load":
        """Merge two loads."""
        return Load(
            seconds=self.seconds + other.seconds, failed=self.failed + other.failed,
            retried=self.retried + other.retried, answers=self.answers + other.answers,
        )  # fmt: skip

    def at(self, share: float) -> float:
        """Return a quantile of the latencies in seconds."""
        return float(np.quantile(self.seconds, share)) if self.seconds else float("nan")


def run(quick: bool) -> Report:
    """Measure all figures; `quick` sends fewer requests for a shorter time."""
    seconds = 5.0 if quick else 30.0
    setting = default_setting()
    folder = Path(tempfile.mkdtemp(prefix="orchard-serve-"))
    os.environ["ORCHARD_SERVE_TOKEN"] = TOKEN
    setup = TinySetup(
        catalog=setting.catalog, model=setting.model, tokenizer=setting.tokenizer,
        prompts=tiny_prompts(setting.catalog, [1]),
    )  # fmt: skip
    export_policy(setup, folder / "policy", step=1)
    try:
        overhead = asyncio.run(_overhead(folder / "policy", 20 if quick else 200))
        rival = _rival(folder / "policy", setting, 3 if quick else 20)
        config = ServeConfig(width=WIDTH, replicas=2, poll_interval_s=0.2, state=folder / "state")
        with ray_session(ClusterConfig(), cpus=4, logs=folder / "logs"):
            two_replicas = Arguments(
                policy=folder / "policy", serve=config.model_copy(update={"port": PORT})
            )
            one_replica = Arguments(
                policy=folder / "policy", serve=config.model_copy(
                    update={"replicas": 1, "port": PORT}
                ),
            )  # fmt: skip
            serving.start(one_replica)
            capacity = asyncio.run(_capacity(setting, seconds))
            equal = asyncio.run(_equal(rival["answers"], rival["histories"]))
            steady, changed = asyncio.run(
                _loads(setting, setup, folder / "policy", seconds, 0.7 * capacity)
            )
            ray_serve.shutdown()
            serving.start(two_replicas)
            killed = asyncio.run(_death(setting, seconds, steady["rate"] * 0.3))
            ray_serve.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    workload = f"W={WIDTH}, {HISTORY} items of history, {len(setting.catalog)} items, torch engine"
    large_catalog = _many(100_000 if quick else 1_000_000, 20 if quick else 200)
    figures = [
        figure("overhead_p50_of_many_items", large_catalog["overhead_ms"], "ms", asked="<= 5",
               note=f"one at a time, no socket, {large_catalog['items']:.0f} items"),
        figure("overhead_p50", overhead["overhead_ms"], "ms", asked="<= 5",
               note=f"one at a time, no socket, {workload}"),
        figure("p99_over_p50", steady["p99"] / steady["p50"], "x", asked="<= 3",
               note=f"open loop at 70 % of a capacity of {capacity:.1f} requests/s"),
        figure("requests_over_hugging_face", capacity / rival["rate"], "x", asked=">= 5",
               note=f"closed loop against {rival['rate']:.2f} requests/s, {workload}"),
        figure("equal_results", equal, "share", asked="== 1", note="item sets of both servers"),
        figure("failed_during_changes", changed["failed"], "requests", asked="== 0",
               note=f"{changed['requests']:.0f} requests, deltas and policy switches"),
        figure("stale_removed_items", changed["stale"], "answers", asked="== 0",
               note="with an item removed more than one second before"),
        figure("p99_added_by_changes", 1000 * (changed["p99"] - steady["p99"]), "ms",
               asked="<= 10", note=f"against the steady load of that rate, {TURNS} turns of each"),
        figure("failed_after_retry", killed["failed"], "requests", asked="== 0",
               note=f"two replicas, one killed; {killed['retried']:.0f} requests were retried"),
    ]  # fmt: skip
    rows: list[Row] = [
        {"case": name} | {k: v for k, v in values.items() if isinstance(v, float)}
        for name, values in (
            ("overhead", overhead), ("steady", {"capacity": capacity} | steady),
            ("rival", rival), ("changes", changed), ("death", killed), ("many", large_catalog),
        )
    ]  # fmt: skip
    return report("serve", figures, rows)


def _many(items: int, number: int) -> dict[str, float]:
    """Measure startup, overhead and peak memory with a catalog of `items` items."""
    setting = default_setting(items, 256)
    setup = TinySetup(
        catalog=setting.catalog, model=setting.model, tokenizer=setting.tokenizer,
        prompts=tiny_prompts(setting.catalog, [1]),
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="orchard-serve-") as folder:
        policy = export_policy(setup, Path(folder) / "policy", step=1)
        start_s = time.perf_counter()
        open_service(policy, ServeConfig(), InMemoryMetrics())
        open_s = time.perf_counter() - start_s
        overhead = asyncio.run(_overhead(policy, number))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return overhead | {"items": float(items), "open_s": open_s, "peak_gib": peak}


def _histories(setting: Setting, number: int) -> list[list[int]]:
    draw = np.random.default_rng(number)
    return draw.integers(len(setting.catalog), size=(number, HISTORY)).tolist()


async def _overhead(folder: Path, number: int) -> dict[str, float]:
    """Measure the latency that application and service add to a search, in milliseconds."""
    from serve.http.routes import create_app

    meters = InMemoryMetrics()
    service: Service = open_service(
        folder, ServeConfig(width=WIDTH, poll_interval_s=3600.0), meters
    )
    app, draw = create_app(service), np.random.default_rng(0)
    items = len(catalogs.load(folder / "catalogue"))
    totals: list[float] = []
    searches: list[float] = []
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://here") as client,
    ):
        for _ in range(number):
            history = draw.integers(items, size=HISTORY).tolist()
            start_s = time.perf_counter()
            answer = await client.post("/v1/recommend", json={"history": history, "k": WIDTH})
            totals.append(time.perf_counter() - start_s)
            searches.append(answer.json()["cost"]["seconds"])
        await service.recommend(RecommendRequest(history=[]), "last")
    added = [total - search for total, search in zip(totals, searches, strict=True)]
    return {
        "overhead_ms": 1000 * statistics.median(added),
        "total_ms": 1000 * statistics.median(totals),
        "search_ms": 1000 * statistics.median(searches),
    }


async def _send(client: httpx.AsyncClient, history: Sequence[int], load: Load, retry: bool) -> None:
    start_s, sent_at = time.perf_counter(), time.time()
    body = {"history": history, "k": 10, "width": WIDTH}
    for attempt in range(2 if retry else 1):
        try:
            answer = await client.post("/v1/recommend", json=body)
            if answer.status_code == 200:
                load.seconds.append(time.perf_counter() - start_s)
                load.answers.append((sent_at, answer.json()))
                return
        except httpx.HTTPError:
            pass
        if retry and attempt == 0:
            load.retried += 1
    load.failed += 1


async def _open_loop(
    setting: Setting, rate: float, seconds: float, *, retry: bool = False,
    disturb: Callable[[httpx.AsyncClient], Awaitable[None]] | None = None,
) -> Load:  # fmt: skip
    """Send requests at random times, independent of the responses to earlier ones."""
    load, draw = Load(), np.random.default_rng(7)
    number = max(5, int(rate * seconds))
    gaps, histories = draw.exponential(1 / rate, number), _histories(setting, number)
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{PORT}", timeout=30.0, limits=httpx.Limits(max_connections=500)
    ) as client:
        requests: list[asyncio.Task[None]] = []
        disturbance = asyncio.ensure_future(disturb(client)) if disturb is not None else None
        for gap, history in zip(gaps, histories, strict=True):
            await asyncio.sleep(float(gap))
            requests.append(asyncio.create_task(_send(client, history, load, retry)))
        await asyncio.gather(*requests)
        if disturbance is not None:
            await disturbance
    return load


async def _capacity(setting: Setting, seconds: float) -> float:
    """Measure requests per second in a closed loop."""
    load, histories = Load(), iter(_histories(setting, 100_000))
    stop = time.perf_counter() + seconds
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{PORT}", timeout=30.0) as client:
        await _send(client, next(histories), Load(), False)

        async def ask() -> None:
            while time.perf_counter() < stop:
                await _send(client, next(histories), load, False)

        start_s = time.perf_counter()
        await asyncio.gather(*(ask() for _ in range(16)))
        return len(load.seconds) / (time.perf_counter() - start_s)


async def _loads(
    setting: Setting, setup: TinySetup, folder: Path, seconds: float, rate: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Measure open-loop latencies in turns without and with deltas and a policy switch."""
    steady, changed, removed = Load(), Load(), dict[int, float]()
    draw = np.random.default_rng(3)
    items_to_remove = iter(draw.permutation(len(setting.catalog))[: 60 * TURNS].tolist())
    values = weights.snapshot(setup.model)
    name = next(iter(values))
    for turn in range(TURNS):
        steady += await _open_loop(setting, rate, seconds)
        weights.restore(setup.model, values | {name: values[name] * (1.01 + 0.01 * turn)})
        # Written beforehand: in production, clients and training do not share a process.
        trained = export_policy(setup, folder.with_name(f"trained-{turn}"), step=2 + turn)
        weights.restore(setup.model, values)

        async def disturb(
            client: httpx.AsyncClient, turn: int = turn, trained: Path = trained
        ) -> None:
            header = {"authorization": f"Bearer {TOKEN}"}
            for step in range(3):
                item_ids = [int(setting.catalog.item_id[i]) for i in islice(items_to_remove, 20)]
                new_item = {"item_id": 10**9 + turn, "sid": setting.catalog.codes[0].tolist()}
                body = {"remove": item_ids, "add": [new_item] if step == 1 else []}
                answer = await client.post("/v1/catalog/delta", json=body, headers=header)
                assert answer.status_code == 200, answer.text
                removed.update(dict.fromkeys(item_ids, time.time()))
                if step == 1:
                    folder.rename(folder.with_name(f"before-{turn}"))
                    trained.rename(folder)
                await asyncio.sleep(seconds / 4)

        changed += await _open_loop(setting, rate, seconds, disturb=disturb)
    stale = sum(
        any(i["item_id"] in removed and sent > removed[i["item_id"]] + 1 for i in answer["items"])
        for sent, answer in changed.answers
    )
    policies = {answer["policy"] for _, answer in changed.answers}
    return {
        "rate": rate, "p50": steady.at(0.5), "p99": steady.at(0.99), "failed": float(steady.failed),
    }, {
        "requests": float(len(changed.answers) + changed.failed), "failed": float(changed.failed),
        "stale": float(stale), "p50": changed.at(0.5), "p99": changed.at(0.99),
        "policies": float(len(policies)),
    }  # fmt: skip


async def _death(setting: Setting, seconds: float, rate: float) -> dict[str, float]:
    """Kill one of two replicas under load, with clients that retry once."""

    async def kill(client: httpx.AsyncClient) -> None:
        await asyncio.sleep(seconds / 3)
        named: list[Any] = list(ray.util.list_named_actors(all_namespaces=True))
        actor_name = next(actor["name"] for actor in named if "Endpoint" in actor["name"])
        await asyncio.to_thread(ray.kill, ray.get_actor(actor_name, namespace="serve"))

    load = await _open_loop(setting, rate, seconds, retry=True, disturb=kill)
    return {
        "requests": float(len(load.answers) + load.failed), "failed": float(load.failed),
        "retried": float(load.retried), "p99": load.at(0.99),
    }  # fmt: skip


def _rival(folder: Path, setting: Setting, number: int) -> dict[str, Any]:
    """Measure requests per second of the Hugging Face server, and collect its answers."""
    server = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.shared.rival", str(folder), str(RIVAL_PORT), str(WIDTH)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    histories = _histories(setting, number)
    try:
        url, answers = f"http://127.0.0.1:{RIVAL_PORT}", list[list[int]]()
        for _ in range(600):
            try:
                httpx.get(f"{url}/docs")
                break
            except httpx.HTTPError:
                time.sleep(0.2)
        httpx.post(f"{url}/recommend", json=histories[0], timeout=120)
        start_s = time.perf_counter()
        for history in histories:
            answer = httpx.post(f"{url}/recommend", json=history, timeout=120)
            answers.append(cast(list[int], answer.json()))
        seconds = time.perf_counter() - start_s
    finally:
        server.terminate()
        server.wait()
    return {"rate": number / seconds, "answers": answers, "histories": histories}


async def _equal(answers: list[list[int]], histories: list[list[int]]) -> float:
    """Return the share of histories for which both servers return the same items."""
    same = 0
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{PORT}", timeout=30.0) as client:
        for theirs, history in zip(answers, histories, strict=True):
            body = {"history": history, "k": 200, "width": WIDTH}
            ours = (await client.post("/v1/recommend", json=body)).json()
            same += {item["item_id"] for item in ours["items"]} == set(theirs)
    return same / len(answers)
