"""Whatever the OpenAPI document allows, and what it does not, sent to the endpoint's application.

Schemathesis draws the requests from the document: half of them fit it, half break it in one place.
They reach the application in this process, one after another, some with the operator's token, so
that deltas and pins happen among the recommendations. Counted is what must not be: an answer of
5xx, an answer that its own schema does not describe, an item that the request or the catalog
forbids, and text that tells of files or code.
"""

import asyncio
import json
import os
import re
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import schemathesis
from fastapi import FastAPI
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.core.failures import Failure, FailureGroup

from benchmarks.shared.measure import Report, Row, figure, report
from orchard.settings import ServeConfig
from orchard.testing import TinySetup, tiny_setup
from serve.factory import open_service
from serve.http.routes import create_app
from serve.metrics import InMemoryMetrics
from serve.service import Service
from serve.testing import export_policy

TOKEN = "fuzz"
LEAK = re.compile(r"Traceback|\.py\b|site-packages|/(tmp|home|root)/")


@dataclass(frozen=True)
class Findings:
    """What requests met."""

    status: Counter[int] = field(default_factory=Counter[int])
    wrong: Counter[str] = field(default_factory=Counter[str])
    """Answers by what is wrong with them."""
    examples: dict[str, str] = field(default_factory=dict[str, str])
    """The first request of each."""


def run(quick: bool) -> Report:
    """10,000 requests; 500 with `quick`."""
    number = 500 if quick else 10_000
    with tempfile.TemporaryDirectory(prefix="orchard-fuzz-") as folder:
        found = attack(tiny_setup(level_size=(5, 4, 6), num_items=40), Path(folder), number)
    note = f"{sum(found.status.values())} requests from the OpenAPI document"
    names = ("server_error", "illegal_items", "leak", "schema")
    figures = [figure(n, found.wrong[n], "answers", asked="== 0", note=note) for n in names]
    rows: list[Row] = [
        {"status": code, "answers": count} for code, count in sorted(found.status.items())
    ]
    rows += [{"wrong": name, "first": request} for name, request in found.examples.items()]
    return report("serve_fuzz", figures, rows)


def attack(world: TinySetup, folder: Path, number: int) -> Findings:
    """Send so many requests to an endpoint of its own."""
    os.environ["ORCHARD_SERVE_TOKEN"] = TOKEN
    export_policy(world, folder / "policy", step=1)
    # As `orchard serve` has it: what is shown where the drawn deadline is shorter than any search.
    popularity = folder / "popularity.parquet"
    item_id = world.catalog.item_id
    pq.write_table(pa.table({"item_id": item_id, "count": np.arange(len(item_id))}), popularity)
    config = ServeConfig(poll_interval_s=3600.0, state=folder / "state", popularity=popularity)
    service = open_service(folder / "policy", config, meters := InMemoryMetrics())
    found = send(create_app(service), number, service)
    found.wrong["illegal_items"] += meters.total("orchard_serve_illegal")
    return found


def send(app: FastAPI, number: int, service: Service | None = None) -> Findings:
    """Draw requests from the document of an application, and judge its answers.

    Args:
        app: of one event loop, so that schemathesis only draws and judges here.
        number: of requests, over all operations.
        service: behind the application; without one its items are not judged.
    """
    found, loop = Findings(), asyncio.new_event_loop()
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    client, lifespan = httpx.AsyncClient(transport=transport), app.router.lifespan_context(app)
    document = schemathesis.openapi.from_dict(app.openapi())
    operations = [one.ok() for one in document.get_all_operations()]
    drawn = st.one_of(
        one.as_strategy(generation_mode=mode) for one in operations for mode in GenerationMode
    )

    @hypothesis.settings(
        max_examples=number, deadline=None, database=None, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.seed(0)
    @hypothesis.given(case=drawn, operator=st.booleans())
    def one(case: Case, operator: bool) -> None:
        sent = case.as_transport_kwargs(base_url="http://shop")
        if operator:
            sent["headers"] = {**sent["headers"], "authorization": f"Bearer {TOKEN}"}
        request = client.build_request(
            **{k: v for k, v in sent.items() if k not in ("cookies", "data")},
            content=sent.get("data"),
        )
        answer = loop.run_until_complete(client.send(request))
        found.status[answer.status_code] += 1
        for name in judge(case, request, answer, service):
            found.wrong[name] += 1
            found.examples.setdefault(name, f"{case.method} {case.path}: {request.content[:500]!r}")

    try:
        loop.run_until_complete(lifespan.__aenter__())
        one()
    finally:
        loop.run_until_complete(lifespan.__aexit__(None, None, None))
        loop.run_until_complete(client.aclose())
        loop.close()
    return found


def judge(
    case: Case, request: httpx.Request, answer: httpx.Response, service: Service | None
) -> list[str]:
    """What is wrong with an answer."""
    wrong: list[str] = []
    if answer.status_code >= 500:
        wrong.append("server_error")
    told = LEAK.search(answer.text)
    if told is not None and told.group().encode() not in request.content:
        wrong.append("leak")
    try:
        case.operation.validate_response(schemathesis.Response.from_httpx(answer, verify=True))
    except (Failure, FailureGroup):
        wrong.append("schema")
    if service is not None and answer.status_code == 200 and case.path == "/v1/recommend":
        wrong += ["illegal_items"] * (not _legal(request, answer.json(), service))
    return wrong


def _legal(request: httpx.Request, answer: dict[str, Any], service: Service) -> bool:
    """Only items of the catalog are shown, each once, and none that was excluded."""
    asked, catalog_version = json.loads(request.content), service.catalog_store.current
    shown = [item["item_id"] for item in answer["items"]]
    gone = {*asked.get("exclude", []), *(asked["history"] if asked.get("exclude_seen") else [])}
    live = catalog_version.catalog.item_id[catalog_version.snapshot.live]
    return (
        len(set(shown)) == len(shown) <= asked.get("k", 10)
        and not gone & set(shown)
        and bool(np.isin(shown, live).all())
    )
