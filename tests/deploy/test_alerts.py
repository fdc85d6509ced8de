"""From a run's exporter through a real Prometheus to alerts and panels. Time is shortened."""

import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cluster.monitoring.exporter import TARGETS, Exporter
from cluster.monitoring.prometheus_metrics import METRICS
from orchard.settings import ClusterConfig

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RULES = (ROOT / "cluster" / "monitoring" / "rules.yml").read_text()
MINUTE_S = 0.5
"""Seconds that stand for one minute of the rules: two scrapes."""

NOT_HERE = {
    "ray_": "Ray's node agents and Ray Serve export these; neither is part of this test",
    "> 0": "shows failures alone, and the run that is shown has none",
}
"""Parts of expressions without results here, and the reason."""


class Searching:
    """Fake pool with the state that the exporter reads."""

    def __init__(self) -> None:
        self.restarts = self.waiting = 0
        self.calls = Counter({(0, "search"): 1})
        self.failures = Counter[tuple[str, str]]()

    def load(self) -> list[tuple[int, float]]:
        return [(1, 0.5 * self.calls[0, "search"])]


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[dict[str, tuple[Exporter, Searching]]]:
    """Exporters of a healthy and of a failing run."""
    made: dict[str, tuple[Exporter, Searching]] = {}
    with closing(Exporter("good")) as good, closing(Exporter("bad")) as bad:
        for exporter, name in ((good, "good"), (bad, "bad")):
            made[name] = exporter, Searching()
            exporter.set("orchard_policy_lag_bound_versions", 0)
            exporter.set("orchard_logprob_gap_bound_nats", 1e-3)
            exporter.attach("rollout", made[name][1])
            exporter.listen(ClusterConfig(metrics_port=0), tmp_path / name)
        yield made


def everything(value: float) -> dict[str, float]:
    """Return all metrics that a run may log."""
    labels = {"phase": "learn", "part": "rule", "metric": "ndcg", "k": "10", "level": "sid"}
    logged = [m.logged.format(**labels) for m in METRICS if m.logged]
    sound = {"learner/logprob_gap": 1e-6, "rollout/lag_versions": 0.0}
    sound |= {"rewards/zero_spread_share": 0.5, "evaluate/hr@10/sid": value}
    decisions = ("skipped", "rolled_back", "refused", "late_events")
    sound |= {f"loop/{name}": 0.0 for name in decisions}
    return dict.fromkeys(logged, value) | sound


def shortened(text: str) -> str:
    """Return the rules with all durations scaled down."""

    def cut(found: re.Match[str]) -> str:
        minutes = int(found[1]) * (60 if found[2] == "h" else 1)
        return f"{max(1, round(minutes * MINUTE_S * 1000))}ms"

    return re.sub(r"(?<=[\[ ])(\d+)([mh])(?=[\]\s])", cut, text)


def until(condition: Callable[[], bool], tick: Callable[[], None]) -> None:
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline:
        tick()
        time.sleep(0.2)


def test_alerts_fire_for_the_run_that_they_are_about_and_for_no_other(
    runs: dict[str, tuple[Exporter, Searching]],
    tmp_path: Path,
    prometheus: Callable[..., Callable[..., Any]],
) -> None:
    ask = prometheus([tmp_path / name / TARGETS for name in runs], shortened(RULES))
    (good, searching), (bad, _) = runs["good"], runs["bad"]
    bad.log(
        "train", 1, everything(1.0) | {"learner/logprob_gap": 0.5, "learner/surrogate": math.nan}
    )
    step = 1

    def tick() -> None:
        nonlocal step
        searching.calls[0, "search"] += 1
        good.log("train", step, everything(1.0))
        step += 1

    def firing() -> set[tuple[str, str]]:
        alerts = ask("alerts")["alerts"]
        up = [alert["labels"] for alert in alerts if alert["state"] == "firing"]
        return {(labels["alertname"], labels.get("run", "")) for labels in up}

    wanted = {
        ("OrchardNonFinite", "bad"),
        ("OrchardLogprobGap", "bad"),
        ("OrchardNoRollouts", "bad"),
    }
    until(lambda: firing() >= wanted, tick)
    assert firing() >= wanted
    assert {alert for alert, run in firing() if run == "good"} <= {"OrchardNoGradient"}
    # Who ends in order says so before the address is gone; who is killed does not, and leaves it.
    address = (tmp_path / "bad" / TARGETS).read_text()
    bad._stop()
    (tmp_path / "bad" / TARGETS).write_text(address)
    address = (tmp_path / "good" / TARGETS).read_text()
    good.close()
    (tmp_path / "good" / TARGETS).write_text(address)  # as an idle pod that is scraped further
    until(lambda: ("OrchardRunGone", "bad") in firing(), lambda: None)
    assert {alert for alert in firing() if alert[0] == "OrchardRunGone"} == {
        ("OrchardRunGone", "bad")
    }


def test_every_panel_shows_something_or_it_is_known_why_not(
    runs: dict[str, tuple[Exporter, Searching]],
    tmp_path: Path,
    prometheus: Callable[..., Callable[..., Any]],
) -> None:
    ask = prometheus([tmp_path / "good" / TARGETS])
    exporter, searching = runs["good"]
    asked = {
        target["expr"]
        for file in (ROOT / "cluster" / "monitoring" / "dashboards").glob("*.json")
        for panel in json.loads(file.read_text())["panels"]
        for target in panel["targets"]
    }
    absent = {text for text in asked if any(part in text for part in NOT_HERE)}
    exporter.set("orchard_policy_version", 1, "rollout-0")
    exporter.set("orchard_checkpoint_step", 1)
    step = 1

    def tick() -> None:
        nonlocal step
        searching.calls[0, "search"] += 1
        exporter.log("train", step, everything(float(step)) | {"sft/loss": math.inf})
        step += 1

    def empty() -> set[str]:
        plain = {
            text: text.replace("$__rate_interval", "4s").replace("$run", ".*") for text in asked
        }
        return {t for t, query in plain.items() if not ask("query", query=query)["result"]}

    until(lambda: empty() <= absent, tick)
    assert empty() == absent
