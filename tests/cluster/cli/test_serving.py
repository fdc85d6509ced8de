"""`orchard serve`: resolved arguments, written configs, and a real endpoint on Ray Serve."""

import asyncio
import socket
import sys
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import yaml
from prometheus_client.parser import text_string_to_metric_families
from ray import serve as ray_serve

from cluster.cli import app as cli
from cluster.cli import endpoint, serving
from orchard.errors import CheckpointError, ConfigError, DataError
from orchard.testing import tiny_setup
from rollout.engine.registry import ENGINES
from serve.app import DEPLOYMENT, build
from serve.metrics import COUNTERS, GAUGES, HISTOGRAMS
from serve.testing import export_policy


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return export_policy(tiny_setup(num_items=40), tmp_path / "runs" / "toy" / "policy", step=7)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def replicas() -> list[str]:
    """Return the names of the live actors."""
    named: list[Any] = list(ray.util.list_named_actors(all_namespaces=True))
    return sorted(one["name"] for one in named if f"#{DEPLOYMENT}#" in one["name"])


async def under_load(
    client: httpx.AsyncClient, body: dict[str, Any], rate: float, work: Awaitable[None]
) -> list[list[int]]:
    """Return the status codes of each request that was sent while `work` ran.

    Requests are sent on schedule regardless of others, and once more after an error. A broken
    connection counts as 0.
    """

    async def one() -> list[int]:
        codes: list[int] = []
        while len(codes) < 2 and codes[-1:] != [200]:
            try:
                codes.append((await client.post("/v1/recommend", json=body)).status_code)
            except httpx.HTTPError:
                codes.append(0)
        return codes

    working, sent = asyncio.ensure_future(work), list[asyncio.Task[list[int]]]()
    while not working.done():
        sent.append(asyncio.create_task(one()))
        await asyncio.sleep(1 / rate)
    await working
    return await asyncio.gather(*sent)


def scrape() -> dict[str, list[dict[str, str]]]:
    """Return the labels of every series that Ray's node agents export, by name."""
    found: dict[str, list[dict[str, str]]] = {}
    alive = [node for node in ray.nodes() if node["Alive"]]  # other tests lose nodes on purpose
    for node in alive:
        url = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
        for family in text_string_to_metric_families(httpx.get(url, timeout=30).text):
            for sample in family.samples:
                found.setdefault(sample.name, []).append(dict(sample.labels))
    return found


def test_a_written_config_checks_out_and_what_serve_would_swallow_is_refused(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "serve.yaml"
    cli.main(["serve", str(policy), "serve.replicas=2", "--write-config", str(file)])
    tree = yaml.safe_load(file.read_text())
    (app,) = tree["applications"]
    assert app["args"] == {"policy": str(policy), "serve": {"replicas": 2}}
    assert app["deployments"][0]["num_replicas"] == 2
    cli.main(["serve", str(policy), "--check-config", str(file)])
    assert "checks out" in capsys.readouterr().out

    def spoilt(*path: Any, value: object = 3) -> None:
        broken = yaml.safe_load(file.read_text())
        at = broken
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        file.with_name("broken.yaml").write_text(yaml.safe_dump(broken))
        serving.read_config(file.with_name("broken.yaml"))

    deployment = ("applications", 0, "deployments", 0)
    for path, said in (
        ((*deployment, "max_ongoing_reqs"), "max_ongoing_requests"),
        ((*deployment, "ray_actor_options", "num_cpu"), "num_cpus"),
        (("http_options", "prt"), "port"),
        (("application",), "applications"),
        (("applications", 0, "args", "serve", "widht"), "width"),
    ):
        with pytest.raises(ConfigError, match=f"unknown key .*{path[-1]}.* did you mean {said}"):
            spoilt(*path)
    serve = ("applications", 0, "args", "serve")
    for path, value, code in (
        ((*deployment, "num_replicas"), "many", "bad_value"),
        ((*serve, "width"), 0, "bad_value"),
        ((*serve, "engine"), "trt", "unknown_name"),
    ):
        with pytest.raises(ConfigError, match=str(path[-1])) as refused:
            spoilt(*path, value=value)
        assert refused.value.code == f"config.{code}"


def test_a_link_is_served_as_a_link_and_a_read_only_place_is_named(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "current"
    link.symlink_to(policy, target_is_directory=True)
    arguments, _ = serving.resolve(link, [])
    assert arguments.policy == link
    monkeypatch.chdir(tmp_path)
    arguments, _ = serving.resolve(Path("current"), ["serve.state=here"])
    assert arguments.policy == link
    assert serving.state_of(arguments) == tmp_path / "here"
    (tmp_path / "file").write_text("")
    arguments, settings = serving.resolve(link, [f"serve.state={tmp_path / 'file'}"])
    with pytest.raises(ConfigError, match=r"file/logs cannot be written .*; set serve\.logs"):
        serving.serve_here(arguments, settings)


def test_a_run_serves_its_policy_and_counts_its_targets(policy: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    pq.write_table(pa.table({"target": [5, 5, 9]}), data / "train.parquet")
    run = tmp_path / "run.toml"
    run.write_text(f'name = "toy"\noutput = "{tmp_path / "runs"}"\ndata.path = "{data}"\n')
    arguments, _ = serving.resolve(run, ["serve.width=20"])
    assert arguments.policy == policy
    assert arguments.serve.width == 20
    assert arguments.serve.popularity is not None
    counts = pq.read_table(arguments.serve.popularity).to_pylist()
    assert {row["item_id"]: row["count"] for row in counts} == {5: 2, 9: 1}
    with pytest.raises(DataError, match="has no policy yet"):
        serving.resolve(run, ["name=other"])
    for override, code in (("serve.widht=20", "unknown_key"), ("serve.engine=trt", "unknown_name")):
        with pytest.raises(ConfigError) as refused:
            serving.resolve(run, [override])
        assert refused.value.code == f"config.{code}"
    (policy / "policy.json").write_text('{"version": ')
    with pytest.raises(CheckpointError, match=r"policy\.json is damaged"):
        serving.resolve(policy, [])


def test_plugins_are_imported_here_and_named_to_the_replicas(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for table in ("_functions", "_facts"):  # the registry forgets the engine after the test
        monkeypatch.setattr(ENGINES, table, dict(getattr(ENGINES, table)))
    (tmp_path / "my_engines.py").write_text(
        'from rollout.engine.registry import ENGINES\nENGINES.register("mine")(ENGINES["torch"])\n'
    )
    run = tmp_path / "run.toml"
    run.write_text(
        f'name = "toy"\noutput = "{tmp_path / "runs"}"\ndata.path = "data"\n'
        'plugins = ["my_engines"]\nserve.engine = "mine"\n'
    )
    arguments, _ = serving.resolve(run, [])
    assert arguments.plugins == ("my_engines",)
    assert (arguments.serve.engine, arguments.policy) == ("mine", policy)
    (app,) = serving.cluster_config(arguments)["applications"]
    assert app["args"]["plugins"] == ["my_engines"]
    with pytest.raises(ConfigError, match="plugins names the module no_such_module"):
        serving.resolve(run, ['plugins=["no_such_module"]'])


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_replicas_on_ray_serve_answer_alike_and_a_death_costs_a_retry_at_most(
    policy: Path,
) -> None:
    port = free_port()
    arguments, _ = serving.resolve(
        policy, [f"serve.port={port}", "serve.replicas=2", "serve.poll_interval_s=0.2"]
    )
    assert serving.start(arguments) == f"http://127.0.0.1:{port}"

    async def work() -> None:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60.0) as client:
            body = {"history": [1, 2], "k": 40}
            first = (await client.post("/v1/recommend", json=body)).json()
            assert first["returned"] == 40
            assert first["policy"].startswith("7-")
            closed = await client.post("/v1/catalog/delta", json={"remove": [3]})
            assert closed.status_code == 401
            answers = await asyncio.gather(
                *(client.post("/v1/recommend", json=body) for _ in range(20))
            )
            assert {a.status_code for a in answers} == {200}
            scores = [[i["score"] for i in a.json()["items"]] for a in answers]
            assert all(np.allclose(one, scores[0], atol=1e-5) for one in scores)
            bad = await client.post("/v1/recommend", json={"history": [1], "k": 0})
            assert bad.status_code == 422
            assert bad.headers["content-type"] == "application/problem+json"
            victim = replicas()[0]

            async def kill() -> None:
                await asyncio.sleep(1)
                await asyncio.to_thread(ray.kill, ray.get_actor(victim, namespace="serve"))
                await asyncio.sleep(3)

            seen = await under_load(client, body, 15.0, kill())
            assert [codes for codes in seen if codes[-1] != 200] == []
            assert victim not in replicas()
            # One ID, whatever the client sends: Serve's proxy alone would echo it.
            for sent in (b"mine-1", b"x" * 3000, b"\xff\xfe", b"a b"):
                reply = await client.get("/healthz", headers=[(b"x-request-id", sent)])
                (given,) = reply.headers.get_list("x-request-id")
                assert (reply.status_code, given == "mine-1") == (200, sent == b"mine-1")

    def beside() -> None:
        """Serve a second endpoint on the same cluster, and end it alone."""
        with pytest.raises(ConfigError, match="already serves an application 'orchard' at /;"):
            serving.start(arguments)
        other, _ = serving.resolve(policy, ["serve.application=second", f"serve.state={policy}2"])
        with pytest.raises(ConfigError, match="route / is taken by the application 'orchard'"):
            serving.start(other)
        overrides = ["serve.application=second", "serve.route=/second", f"serve.state={policy}2"]
        moved, _ = serving.resolve(policy, [*overrides, "serve.port=1"])
        with pytest.raises(ConfigError, match=f"already runs on this cluster with port {port}"):
            serving.start(moved)
        other, _ = serving.resolve(policy, overrides)
        address = serving.start(other)
        assert address == f"http://127.0.0.1:{port}/second/"
        assert httpx.get(f"{address}v1/policy").json()["variants"][0]["step"] == 7
        endpoint.stop(other.serve, own=False)
        assert httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
        assert httpx.get(f"{address}healthz").status_code == 404
        endpoint.stop(arguments.serve, own=True)
        assert endpoint.serve_instance() is None

    try:
        asyncio.run(work())
        beside()
    finally:
        ray_serve.shutdown()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_every_metric_is_scraped_and_a_redeployed_replica_loses_no_request(
    policy: Path, tmp_path: Path
) -> None:
    port, counts = free_port(), tmp_path / "popularity.parquet"
    pq.write_table(pa.table({"item_id": [1, 2], "count": [2, 1]}), counts)
    arguments, _ = serving.resolve(
        policy,
        [f"serve.port={port}", "serve.poll_interval_s=0.2", "serve.cache_s=60",
         "serve.prefix_cache_mib=8", f"serve.popularity={counts}"],
    )  # fmt: skip
    serving.start(arguments)
    # Ray shows a counter from its first count on, and nothing illegal is ever answered.
    wanted = {
        **{f"ray_{name}_total": set(tags) for name, tags in COUNTERS.items()},
        **{f"ray_{name}": set(tags) for name, tags in GAUGES.items()},
        **{f"ray_{name}_bucket": {*tags, "le"} for name, tags in HISTOGRAMS.items()},
    }
    del wanted["ray_orchard_serve_illegal_total"]

    async def work() -> None:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60.0) as client:
            longer = {"history": [1, 2]}  # continues the kept history
            for more in ({}, {}, longer, {"deadline_ms": 1e-6, "k": 3}, {"k": 100_000}):
                await client.post("/v1/recommend", json={"history": [1], **more})
            (first,) = replicas()
            wider = arguments.serve.model_copy(update={"width": 60})
            changed = build(arguments.model_copy(update={"serve": wider}))
            redeploy = asyncio.to_thread(ray_serve.run, changed, name="orchard")
            seen = await under_load(client, {"history": [1]}, 10.0, redeploy)
            assert {tuple(codes) for codes in seen} == {(200,)}
            assert (await client.post("/v1/recommend", json={"history": [1]})).json()["width"] == 60
            assert first not in replicas()
            await client.post("/v1/recommend", json=longer)
            for _ in range(60):  # Ray's workers report every ten seconds
                shown = scrape()
                if wanted.keys() <= shown.keys():
                    break
                await asyncio.sleep(0.5)
            assert wanted.keys() - shown.keys() == set()
            for name, tags in wanted.items():
                asked = tags | {"deployment", "replica", "application"}
                assert all(asked <= labels.keys() for labels in shown[name]), name
            phases = {labels["phase"] for labels in shown["ray_orchard_serve_phase_seconds_bucket"]}
            assert phases == {"queue", "prefill", "levels", "post", "total"}

    try:
        asyncio.run(work())
    finally:
        ray_serve.shutdown()
