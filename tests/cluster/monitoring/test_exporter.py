"""The Prometheus exporter: its metrics, and values that stay."""

import json
import math
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.monitoring.exporter import READ_AT_SCRAPE, TARGETS, Exporter
from cluster.monitoring.prometheus_metrics import METRICS, find
from orchard.errors import ConfigError
from orchard.settings import ClusterConfig

STEP = {
    "rewards/mean": 0.5,
    "rewards/rule": 0.25,
    "rewards/zero_spread_share": 0.125,
    "rollout/prompts": 16.0,
    "rollout/forward_tokens": 1000.0,
    "rollout/lag_versions": 1.0,
    "rollout/restarts": 0.0,
    "learner/restarts": 1.0,
    "cluster/step_s": 2.0,
    "cluster/wait_s": 0.5,
    "cluster/publish_s": 0.03,
    "evaluate/ndcg@10/sid": 0.1,
}


class Slots:
    """Fake pool with the state that the exporter reads."""

    def __init__(self, calls: int) -> None:
        self.restarts, self.waiting = 1, 3
        self.calls = Counter({(0, "search"): calls, (1, "search"): 2})
        self.failures = Counter({("search", "died"): 1})

    def load(self) -> list[tuple[int, float]]:
        return [(2, 1.5), (0, 0.5)]


@pytest.fixture(autouse=True)
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait little for scrapes that will not come."""
    monkeypatch.setattr("cluster.monitoring.exporter.LAST_SCRAPE_S", 0.05)


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[tuple[Exporter, str]]:
    exporter = Exporter("toy")
    port = exporter.listen(ClusterConfig(metrics_port=0), tmp_path)
    yield exporter, f"http://127.0.0.1:{port}/metrics"
    exporter.close()


def scrape(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def samples(text: str) -> dict[str, float]:
    """Parse samples to `name{labels}` -> value, without the label of the run."""
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {k: v for k, v in sorted(sample.labels.items()) if k != "run"}
            values[f"{sample.name}{labels or ''}"] = sample.value
    return values


def test_whoever_scrapes_from_elsewhere_is_given_an_address_of_this_machine(tmp_path: Path) -> None:
    exporter = Exporter("toy")
    port = exporter.listen(ClusterConfig(metrics_port=0, metrics_host="0.0.0.0"), tmp_path)
    (target,) = json.loads((tmp_path / TARGETS).read_text())
    exporter.close()
    host, _, shown = target["targets"][0].rpartition(":")
    assert host not in ("", "0.0.0.0")
    assert int(shown) == port


def test_matches_of_steps_are_no_parts_of_the_reward() -> None:
    assert find("rewards/rule")
    assert not find("rewards/match_3")
    assert not find("rewards/step_signal_share")


def test_a_step_is_shown_under_the_names_of_the_catalog(
    listening: tuple[Exporter, str],
) -> None:
    exporter, url = listening
    exporter.log("train", 1, STEP)
    exporter.log("train", 2, STEP | {"learner/surrogate": math.nan})
    shown = samples(scrape(url))
    assert shown["orchard_prompts_total"] == 32
    assert shown["orchard_rollout_forward_tokens_total"] == 2000
    assert shown["orchard_reward_mean"] == 0.5
    assert shown["orchard_reward_part_mean{'part': 'rule'}"] == 0.25
    assert "orchard_reward_part_mean{'part': 'mean'}" not in shown
    assert shown["orchard_step_seconds_sum"] == 4
    assert shown["orchard_step_phase_seconds_total{'phase': 'wait'}"] == 1
    assert shown["orchard_step_phase_seconds_total{'phase': 'publish'}"] == 0.06
    assert shown["orchard_publish_seconds_count"] == 2
    assert shown["orchard_policy_lag_versions_bucket{'le': '0.0'}"] == 0
    assert shown["orchard_policy_lag_versions_bucket{'le': '1.0'}"] == 2
    assert shown["orchard_non_finite_total{'logged': 'learner/surrogate'}"] == 1
    assert shown["orchard_restarts_total{'pool': 'learner'}"] == 1
    key = "orchard_evaluation_ratio{'k': '10', 'level': 'sid', 'metric': 'ndcg'}"
    assert shown[key] == 0.1
    assert abs(shown["orchard_last_step_timestamp_seconds{'phase': 'train'}"] - time.time()) < 60


def test_counters_of_a_pool_go_on_where_an_earlier_one_ended(
    listening: tuple[Exporter, str],
) -> None:
    exporter, url = listening
    pools: list[Any] = [Slots(5), Slots(1)]
    for pool in pools:
        exporter.attach("rollout", pool)
    shown = samples(scrape(url))
    call = "orchard_pool_calls_total{'actor': '0', 'method': 'search', 'pool': 'rollout'}"
    assert shown[call] == 6
    busy = "orchard_pool_busy_seconds_total{'actor': '0', 'pool': 'rollout'}"
    assert shown[busy] == 3
    assert shown["orchard_pool_waiting{'pool': 'rollout'}"] == 3
    assert shown["orchard_restarts_total{'pool': 'rollout'}"] == 2
    assert set(shown) == set(samples(scrape(url)))


def test_every_metric_has_a_source_a_unit_and_a_meaning() -> None:
    units = ("_total", "_seconds", "_versions", "_nats", "_ratio", "_bytes")
    plain = {"_mean", "_best", "_max", "_norm", "_rate", "_step", "_loss", "_surrogate"}
    plain |= {"_diversity", "_version", "_actors", "_hand", "_waiting"}
    plain |= {"_reward", "_reward_low", "_reward_high", "_drift", "_requests", "_events"}
    assert len({m.name for m in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert metric.help.endswith(".")
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert metric.name.endswith((*units, *plain)), metric.name
        if metric.logged is not None:
            name = metric.logged.replace("{phase}", "learn").replace("{", "").replace("}", "")
            assert metric in [m for m, _ in find(name)]


def test_a_taken_port_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cluster.metrics_port = {port} .* or 0 for any"):
            Exporter("toy").listen(ClusterConfig(metrics_port=port), tmp_path)


def test_nothing_listens_unless_asked(tmp_path: Path) -> None:
    assert Exporter("toy").listen(ClusterConfig(), tmp_path) is None
    assert not (tmp_path / TARGETS).exists()


def test_the_address_is_written_and_taken_back(tmp_path: Path) -> None:
    exporter = Exporter("toy")
    port = exporter.listen(ClusterConfig(metrics_port=0), tmp_path)
    (target,) = json.loads((tmp_path / TARGETS).read_text())
    assert target == {"targets": [f"127.0.0.1:{port}"], "labels": {"job": "orchard"}}
    exporter.close()
    assert not (tmp_path / TARGETS).exists()


@pytest.mark.slow
@pytest.mark.parametrize("in_order", [True, False])
def test_the_end_is_exported_before_nobody_listens_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_order: bool
) -> None:
    monkeypatch.setattr("cluster.monitoring.exporter.LAST_SCRAPE_S", 60.0)
    exporter = Exporter("toy")
    url = f"http://127.0.0.1:{exporter.listen(ClusterConfig(metrics_port=0), tmp_path)}/metrics"
    shown = samples(scrape(url))
    assert shown["orchard_end_timestamp_seconds"] == 0 < shown["orchard_start_timestamp_seconds"]
    ending = threading.Thread(target=exporter.close if in_order else exporter._stop)
    ending.start()
    if in_order:  # it listens until it is scraped
        while (end := samples(scrape(url))["orchard_end_timestamp_seconds"]) == 0:
            pass
        assert end >= shown["orchard_start_timestamp_seconds"]
    ending.join(30)
    assert not ending.is_alive()
    with pytest.raises(OSError, match=r"refused|reset"):
        scrape(url)


def test_an_end_waits_for_no_scraper_that_has_gone(tmp_path: Path) -> None:
    exporter = Exporter("toy")
    exporter.listen(ClusterConfig(metrics_port=0), tmp_path)
    assert exporter._until_next_scrape() == 0
    exporter._scrape_times.extend([time.monotonic() - 30, time.monotonic() - 20.5])
    assert exporter._until_next_scrape() == 0
    exporter._scrape_times.append(time.monotonic() - 10)
    assert 0 < exporter._until_next_scrape() <= 0.05


def test_promtool_finds_nothing_to_complain_about(listening: tuple[Exporter, str]) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    exporter, url = listening
    exporter.log("train", 1, {m.logged.format(**_any(m.labels)): 1.0 for m in METRICS if m.logged})
    pool: Any = Slots(5)
    exporter.attach("rollout", pool)
    text = scrape(url)
    families = {f"orchard_{f.name.removeprefix('orchard_')}" for f in _families(text)}
    unseen = {m.name.removesuffix("_total") for m in METRICS} - families
    assert unseen <= {n.removesuffix("_total") for n in READ_AT_SCRAPE}
    ended = subprocess.run(
        [promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout + ended.stderr) == (0, "")


def _any(labels: tuple[str, ...]) -> dict[str, str]:
    return {label: {"phase": "learn"}.get(label, "x") for label in labels}


def _families(text: str) -> list[Any]:
    return list(text_string_to_metric_families(text))


@pytest.mark.slow
def test_a_real_prometheus_finds_the_run_and_counts_as_the_driver_does(
    listening: tuple[Exporter, str], tmp_path: Path, prometheus: Callable[..., Any]
) -> None:
    exporter, _ = listening
    ask = prometheus([tmp_path / TARGETS])
    exporter.log("train", 1, STEP)
    exporter.log("train", 2, STEP)
    deadline, series = time.monotonic() + 60, []
    while not series and time.monotonic() < deadline:
        series = ask("query", query="orchard_rollout_forward_tokens_total")["result"]
        time.sleep(0.2)
    assert [(f["metric"]["run"], float(f["value"][1])) for f in series] == [("toy", 2000.0)]
