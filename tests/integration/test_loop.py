"""Two rounds of the loop on a tiny world: a real endpoint, real training, simulated users."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import uvicorn

from cluster.loop.measure import realized
from cluster.loop.run import loop_folder, run_loop
from cluster.loop.state import read_states
from cluster.loop.train import train_round
from cluster.report.report import write_report
from orchard import config
from orchard.data.synthetic import WorldParams, write_world
from orchard.feedback.schema import ROWS
from orchard.settings import Config, ServeConfig
from serve.factory import open_service
from serve.http.routes import create_app
from serve.metrics import InMemoryMetrics
from tests.fixtures.begun import untrained
from tests.fixtures.runs import write_tiny_run

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


@contextmanager
def in_a_thread(policy: Path, serving: ServeConfig) -> Iterator[str]:
    """Serve over a real socket, without Ray Serve, whose start would cost this test a minute."""
    app = create_app(open_service(policy, serving, InMemoryMetrics()))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def settings(folder: Path, **loop: Any) -> Config:
    """Return the settings of a loop whose first policy has random weights."""
    write_world(folder / "data", WorldParams(num_items=60, num_users=120, level_size=(4, 5, 6)))
    path = write_tiny_run(
        folder,
        rollout={"engine": "torch", "group_size": 4, "batch_size": 8, "threads": 1},
        learner={"prompts_per_step": 8, "threads": 1, "lr": 1e-3},
        evaluate={"every": 0, "valid_rows": 8, "beams": 4, "valid_beams": 10},
        serve={"width": 10, "poll_interval_s": 0.2},
        loop={
            "users": "synthetic", "rounds": 2, "requests": 60, "steps": 2, "k": 5,
            "canary": 0.4, "min_draws": 5, "explore": 0.6, "learn": "clicks",
        }
        | loop,
    )  # fmt: skip
    loaded = config.load(path)
    untrained(loaded)
    return loaded


@pytest.mark.timeout(900)  # three runs, one after the other, on a machine that may be busy
def test_two_rounds_and_the_rest_after_an_interruption(tmp_path: Path) -> None:
    run = settings(tmp_path)

    class Stopped(Exception):
        pass

    calls: list[int] = []

    def stops_once(settings: Config, number: int, **changes: Any) -> Path:
        calls.append(number)
        trained = train_round(settings, number, **changes)
        if calls == [0, 1]:
            raise Stopped
        return trained

    with pytest.raises(Stopped):
        run_loop(run, in_a_thread, train=stops_once)
    first, second = read_states(loop_folder(run))
    assert first.phase == "done"
    assert second.phase == "watched"
    log = run_loop(run, in_a_thread, train=stops_once)
    assert calls == [0, 1, 1]
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["number"] for row in rows] == [0, 1]
    assert {row["outcome"] for row in rows} <= {"published", "refused"}
    for row in rows:
        # All that was asked was shown and logged, and every event was joined.
        assert row["counts"]["requests"] == 60
        assert row["counts"]["attributed"] == row["counts"]["window_events"]
        assert row["counts"]["late_events"] == row["counts"]["requests_failed"] == 0
    again = run_loop(run, in_a_thread)  # nothing is left to do
    assert again.read_text() == log.read_text()
    # Whoever was served the canary's policy was counted by its version.
    state = read_states(loop_folder(run))[1]
    if state.watch:
        feedback = pl.read_parquet(loop_folder(run) / "feedback" / "00001" / ROWS)
        assert feedback["policy"].n_unique() == 2
        assert state.realized is not None
        assert state.realized.n < (realized(feedback) or state.realized).n
    text = write_report(run.run_dir).read_text()
    assert "Rounds of the loop" in text
