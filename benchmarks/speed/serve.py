"""Benchmark the endpoint: overhead, throughput, a baseline server, changes and failure under load.

All is measured over real HTTP against replicas on Ray Serve, except the overhead over the bare
search: that is one request at a time through the whole application, without a socket and without
Ray, minus the time of a search that shares nothing with the endpoint. The baselines are FastAPI
servers around Hugging Face's model with the same width and items (`benchmarks.shared.rival`); all
servers have one thread and get equally many requests at a time from clients of the same kind.

Client, proxy, replicas and other processes share the cores of the machine: figures are those of the
smallest deployment, and only ratios within one run are meaningful.
"""

import asyncio
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import ray
from ray import serve as ray_serve

from benchmarks.shared.bare_search import BareSearch
from benchmarks.shared.http_load import CLIENTS, Load, closed_loop, measure_rival
from benchmarks.shared.measure import Report, Row, figure, report
from benchmarks.speed import serve_ways
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
PORT, RIVAL_PORT, PATH = 8765, 8766, "/v1/recommend"


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
        ways, way_rows = serve_ways.run(
            folder / "policy", len(setting.catalog), 10 if quick else 50
        )
        strong, rival = (
            asyncio.run(measure_rival(folder / "policy", way, WIDTH, RIVAL_PORT,
                                      _histories(setting, 20_000), seconds))
            for way in ("strong", "generate")
        )  # fmt: skip
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
            equal = min(asyncio.run(_equal(r["answers"], r["histories"])) for r in (strong, rival))
            steady, changed = asyncio.run(
                _loads(setting, setup, folder / "policy", seconds, 0.7 * capacity)
            )
            ray_serve.shutdown()
            serving.start(two_replicas)
            killed = asyncio.run(_death(setting, seconds))
            ray_serve.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    workload = f"W={WIDTH}, {HISTORY} items of history, {len(setting.catalog)} items, torch engine"
    large_catalog = _many(100_000 if quick else 1_000_000, 20 if quick else 200)
    alike = f"{CLIENTS} requests in flight from clients that keep connections, {workload}"
    figures = [
        figure("requests_over_strong_loop", capacity / strong["rate"], "x", asked=">= 1",
               note=f"against {strong['rate']:.2f} requests/s of a micro-batching server around a "
               f"loop that computes each prompt once; {alike}"),
        figure("requests_over_hugging_face", capacity / rival["rate"], "x", asked=">= 5",
               note=f"against {rival['rate']:.2f} requests/s around `generate`; {alike}"),
        figure("overhead_p50_of_many_items", large_catalog["overhead_ms"], "ms", asked="<= 5",
               note=f"one at a time, no socket, against a separate search, "
               f"{large_catalog['items']:.0f} items"),
        figure("overhead_p50", overhead["overhead_ms"], "ms", asked="<= 5",
               note=f"one at a time, no socket, against a separate search, {workload}"),
        figure("p99_over_p50", steady["p99"] / steady["p50"], "x", asked="<= 3",
               note=f"open loop at 70 % of a capacity of {capacity:.1f} requests/s"),
        figure("equal_results", equal, "share", asked="== 1", note="item sets of all servers"),
        figure("failed_during_changes", changed["failed"], "requests", asked="== 0",
               note=f"{changed['requests']:.0f} requests, deltas and policy switches"),
        figure("stale_removed_items", changed["stale"], "answers", asked="== 0",
               note="with an item removed more than one second before"),
        figure("p99_added_by_changes", 1000 * (changed["p99"] - steady["p99"]), "ms",
               asked="<= 10", note=f"against the steady load of that rate, {TURNS} turns of each"),
        figure("failed_after_retry", killed["failed"], "requests", asked="== 0",
               note=f"two replicas, one killed with {killed['in_flight_at_kill']:.0f} requests in "
               f"flight, of {killed['requests']:.0f}"),
        figure("retried_after_kill", killed["retried"], "requests", asked=">= 1",
               note="failed when the replica was killed, and sent once more"),
        *ways,
    ]  # fmt: skip
    rows: list[Row] = [
        {"case": name} | {k: v for k, v in values.items() if isinstance(v, float)}
        for name, values in (
            ("overhead", overhead), ("steady", {"capacity": capacity} | steady),
            ("strong_loop", strong), ("rival", rival), ("changes", changed), ("death", killed),
            ("many", large_catalog),
        )
    ]  # fmt: skip
    return report("serve", figures, [*rows, *way_rows])


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


def _at(load: Load, share: float) -> float:
    """Return a quantile of the latencies in seconds."""
    return float(np.quantile(load.seconds, share)) if load.seconds else float("nan")


def _histories(setting: Setting, number: int) -> list[list[int]]:
    draw = np.random.default_rng(number)
    return draw.integers(len(setting.catalog), size=(number, HISTORY)).tolist()


async def _overhead(folder: Path, number: int) -> dict[str, float]:
    """Measure the latency that application and service add to a search, in milliseconds.

    The bare search has a policy and an engine of its own and takes turns with the requests;
    "reported_ms" is the time that the endpoint states for its search.
    """
    from serve.http.routes import create_app

    bare = BareSearch(folder, WIDTH)
    meters = InMemoryMetrics()
    service: Service = open_service(
        folder, ServeConfig(width=WIDTH, poll_interval_s=3600.0), meters
    )
    app, draw = create_app(service), np.random.default_rng(0)
    items = len(catalogs.load(folder / "catalogue"))
    totals: list[float] = []
    searches: list[float] = []
    reported: list[float] = []
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
            reported.append(answer.json()["cost"]["seconds"])
            prompts = bare.prompts(history)
            start_s = time.perf_counter()
            bare.search(prompts)
            searches.append(time.perf_counter() - start_s)
        await service.recommend(RecommendRequest(history=[]), "last")
    added = [total - search for total, search in zip(totals, searches, strict=True)]
    return {
        "overhead_ms": 1000 * statistics.median(added),
        "total_ms": 1000 * statistics.median(totals),
        "search_ms": 1000 * statistics.median(searches),
        "reported_ms": 1000 * statistics.median(reported),
    }


async def _open_loop(
    setting: Setting, rate: float, seconds: float, *,
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
            body = {"history": history, "k": 10, "width": WIDTH}
            requests.append(asyncio.create_task(load.send(client, PATH, body)))
        await asyncio.gather(*requests)
        if disturbance is not None:
            await disturbance
    return load


async def _capacity(setting: Setting, seconds: float) -> float:
    """Measure requests per second in a closed loop."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{PORT}", timeout=30.0) as client:
        return await closed_loop(client, PATH, _bodies(setting), seconds)


def _bodies(setting: Setting) -> Iterator[dict[str, Any]]:
    return ({"history": h, "k": 10, "width": WIDTH} for h in _histories(setting, 100_000))


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
        "rate": rate, "p50": _at(steady, 0.5), "p99": _at(steady, 0.99),
        "failed": float(steady.failed),
    }, {
        "requests": float(len(changed.answers) + changed.failed), "failed": float(changed.failed),
        "stale": float(stale), "p50": _at(changed, 0.5), "p99": _at(changed, 0.99),
        "policies": float(len(policies)),
    }  # fmt: skip


async def _death(setting: Setting, seconds: float) -> dict[str, float]:
    """Kill one of two busy replicas: 16 requests are in flight, and clients retry once."""
    load, at_kill = Load(), list[int]()

    async def kill() -> None:
        await asyncio.sleep(seconds / 3)
        named: list[Any] = list(ray.util.list_named_actors(all_namespaces=True))
        actor_name = next(actor["name"] for actor in named if "Endpoint" in actor["name"])
        replica = await asyncio.to_thread(ray.get_actor, actor_name, namespace="serve")
        at_kill.append(load.in_flight)
        await asyncio.to_thread(ray.kill, replica)

    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{PORT}", timeout=30.0) as client:
        killing = asyncio.ensure_future(kill())
        await closed_loop(client, PATH, _bodies(setting), seconds, load=load, retry=True)
        await killing
    return {
        "requests": float(len(load.answers) + load.failed), "failed": float(load.failed),
        "in_flight_at_kill": float(at_kill[0]), "retried": float(load.retried),
        "p99": _at(load, 0.99),
    }  # fmt: skip


async def _equal(answers: list[list[int]], histories: list[list[int]]) -> float:
    """Return the share of histories for which both servers return the same items."""
    same = 0
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{PORT}", timeout=30.0) as client:
        for theirs, history in zip(answers, histories, strict=True):
            body = {"history": history, "k": 200, "width": WIDTH}
            ours = (await client.post("/v1/recommend", json=body)).json()
            same += {item["item_id"] for item in ours["items"]} == set(theirs)
    return same / len(answers)
