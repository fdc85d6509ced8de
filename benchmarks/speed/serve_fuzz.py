"""Fuzz the endpoint's application with valid and invalid requests from its OpenAPI document.

Schemathesis draws some of the requests from the document: half of these are valid, half violate it
in one place, and few are answered 200, because the document does not name the items. The others are
drawn about the items of the catalog, so that at least half of all are answered.
They are sent to the application in this process, one after another, some with the operator's token,
so that deltas and pins are interleaved with recommendations. The benchmark counts violations: 5xx
responses, responses that do not match their schema, items that the request or the catalog excludes,
and text that leaks files or code.
"""

import asyncio
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
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
from hypothesis.strategies import SearchStrategy
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
    """Status codes and violations found by fuzzing."""

    status: Counter[int] = field(default_factory=Counter[int])
    wrong: Counter[str] = field(default_factory=Counter[str])
    """Number of responses by violation."""
    examples: dict[str, str] = field(default_factory=dict[str, str])
    """First request of each violation."""


def run(quick: bool) -> Report:
    """Send 10,000 requests, or 500 with `quick`."""
    number = 500 if quick else 10_000
    with tempfile.TemporaryDirectory(prefix="orchard-fuzz-") as folder:
        findings = attack(tiny_setup(level_size=(5, 4, 6), num_items=40), Path(folder), number)
    note = f"{sum(findings.status.values())} requests from the document and the catalog"
    names = ("server_error", "illegal_items", "leak", "schema")
    figures = [figure(n, findings.wrong[n], "answers", asked="== 0", note=note) for n in names]
    answered = findings.status[200] / max(1, sum(findings.status.values()))
    figures.append(figure("answered_200", answered, "share", asked=">= 0.5", note=note))
    rows: list[Row] = [
        {"status": code, "answers": count} for code, count in sorted(findings.status.items())
    ]
    rows += [{"wrong": name, "first": request} for name, request in findings.examples.items()]
    return report("serve_fuzz", figures, rows)


def attack(world: TinySetup, folder: Path, number: int) -> Findings:
    """Create an endpoint and send `number` requests to it."""
    os.environ["ORCHARD_SERVE_TOKEN"] = TOKEN
    export_policy(world, folder / "policy", step=1)
    # As in `orchard serve`: the fallback if a drawn deadline is shorter than any search.
    popularity = folder / "popularity.parquet"
    item_id = world.catalog.item_id
    pq.write_table(pa.table({"item_id": item_id, "count": np.arange(len(item_id))}), popularity)
    config = ServeConfig(poll_interval_s=3600.0, state=folder / "state", popularity=popularity)
    service = open_service(folder / "policy", config, meters := InMemoryMetrics())
    findings = send(create_app(service), number, service)
    findings.wrong["illegal_items"] += meters.total("orchard_serve_illegal")
    return findings


def send(app: FastAPI, number: int, service: Service | None = None) -> Findings:
    """Draw requests from the document of an application, and check its responses.

    Args:
        app: application, called on one event loop; schemathesis only draws and validates.
        number: number of requests over all operations.
        service: service of the application; without one, items are not checked.
    """
    findings, loop = Findings(), asyncio.new_event_loop()
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    client, lifespan = httpx.AsyncClient(transport=transport), app.router.lifespan_context(app)
    document = schemathesis.openapi.from_dict(app.openapi())
    operations = [result.ok() for result in document.get_all_operations()]
    cases = st.one_of(
        operation.as_strategy(generation_mode=mode)
        for operation in operations
        for mode in GenerationMode
    )
    if service is not None:
        from_document, answered = cases, answerable(operations, service)
        cases = st.integers(0, 7).flatmap(lambda kind: answered if kind else from_document)

    @hypothesis.settings(
        max_examples=number, deadline=None, database=None, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.seed(0)
    @hypothesis.given(case=cases, operator=st.booleans())
    def check(case: Case, operator: bool) -> None:
        request_args = case.as_transport_kwargs(base_url="http://shop")
        if operator:
            request_args["headers"] = {
                **request_args["headers"],
                "authorization": f"Bearer {TOKEN}",
            }
        request = client.build_request(
            **{k: v for k, v in request_args.items() if k not in ("cookies", "data")},
            content=request_args.get("data"),
        )
        response = loop.run_until_complete(client.send(request))
        findings.status[response.status_code] += 1
        for name in judge(case, request, response, service):
            findings.wrong[name] += 1
            findings.examples.setdefault(
                name, f"{case.method} {case.path}: {request.content[:500]!r}"
            )

    try:
        loop.run_until_complete(lifespan.__aenter__())
        check()
    finally:
        loop.run_until_complete(lifespan.__aexit__(None, None, None))
        loop.run_until_complete(client.aclose())
        loop.close()
    return findings


def answerable(operations: Sequence[Any], service: Service) -> SearchStrategy[Case]:
    """Draw requests about items of the catalog that the service begins with."""
    catalog = service.catalog_store.current.catalog
    operation_of = {operation.path: operation for operation in operations}
    items = st.sampled_from(catalog.item_id.tolist())
    history, k = st.lists(items, min_size=1, max_size=10), st.integers(1, 10)
    beams = st.fixed_dictionaries(
        {"history": history, "k": k},
        optional={
            "width": st.integers(20, 30), "exclude": st.lists(items, max_size=5),
            "exclude_seen": st.booleans(),
        },
    )  # fmt: skip
    draws = st.fixed_dictionaries(
        {"history": history, "k": k, "decoder": st.just("beam_sample"), "seed": st.integers(0, 100)}
    )
    bodies = st.one_of(beams, beams, draws)
    batches = st.fixed_dictionaries({"requests": st.lists(bodies, min_size=1, max_size=4)})
    scores = st.fixed_dictionaries(
        {"history": history, "items": st.lists(items, min_size=1, max_size=20)},
        optional={"order": st.booleans()},
    )
    deltas = st.fixed_dictionaries({"remove": st.lists(items, min_size=1, max_size=1)})

    def post(path: str, body: SearchStrategy[dict[str, Any]]) -> SearchStrategy[Case]:
        case = operation_of[path].Case
        return body.map(lambda value: case(body=value, media_type="application/json"))

    return st.one_of(
        *[post("/v1/recommend", bodies)] * 6,
        post("/v1/recommend:batch", batches),
        post("/v1/score", scores),
        items.map(
            lambda item: operation_of["/v1/items/{item_id}"].Case(
                path_parameters={"item_id": str(item)}
            )
        ),
        # A removal is seldom the last change: the items of the first version come back.
        post("/v1/catalog/delta", deltas),
        post("/v1/catalog/delta", st.just({"rollback_to": 0})),
    )


def judge(
    case: Case, request: httpx.Request, response: httpx.Response, service: Service | None
) -> list[str]:
    """Return the violations of a response."""
    problems: list[str] = []
    if response.status_code >= 500:
        problems.append("server_error")
    leak = LEAK.search(response.text)
    if leak is not None and leak.group().encode() not in request.content:
        problems.append("leak")
    try:
        case.operation.validate_response(schemathesis.Response.from_httpx(response, verify=True))
    except (Failure, FailureGroup):
        problems.append("schema")
    if service is not None and response.status_code == 200 and case.path == "/v1/recommend":
        problems += ["illegal_items"] * (not _legal(request, response.json(), service))
    return problems


def _legal(request: httpx.Request, response_body: dict[str, Any], service: Service) -> bool:
    """Return whether the items are live, distinct, at most `k`, and not excluded."""
    request_body, catalog_version = json.loads(request.content), service.catalog_store.current
    returned = [item["item_id"] for item in response_body["items"]]
    excluded = {
        *request_body.get("exclude", []),
        *(request_body["history"] if request_body.get("exclude_seen") else []),
    }
    live = catalog_version.catalog.item_id[catalog_version.snapshot.live]
    return (
        len(set(returned)) == len(returned) <= request_body.get("k", 10)
        and not excluded & set(returned)
        and bool(np.isin(returned, live).all())
    )
