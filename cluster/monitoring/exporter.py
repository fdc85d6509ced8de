"""Export a run to Prometheus: its logged metrics, and the state of its pools at each scrape.

The exporter runs in the driver, which has all metrics. An exported sample stays until the process
ends.
"""

import json
import math
import threading
import time
from collections import Counter as Counts
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, SupportsFloat, runtime_checkable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from ray.util import get_node_ip_address

from cluster.monitoring.prometheus_metrics import BY_NAME, METRICS, Metric, find
from orchard.errors import ConfigError
from orchard.settings import ClusterConfig

TARGETS = Path("prometheus") / "targets.json"
"""File in the run folder by which Prometheus discovers the exporter (file-based discovery)."""

REASONS = ("died", "deadline", "raised", "unfit")
"""Reasons for which a call of a pool fails."""

LAST_SCRAPE_S = 60.0
"""Maximum time that a run that has ended waits for the scrape that sees its end."""

READ_AT_SCRAPE = (
    "orchard_end_timestamp_seconds",
    "orchard_restarts_total",
    "orchard_pool_failures_total",
    "orchard_pool_actors",
    "orchard_pool_calls_total",
    "orchard_pool_busy_seconds_total",
    "orchard_pool_in_hand",
    "orchard_pool_waiting",
)
"""Metrics that are read from the pools and the controller at each scrape."""


@runtime_checkable
class PoolStats(Protocol):
    """Exported state of a pool; see `cluster.actors.pool.Pool` for the meaning of each field."""

    restarts: int
    waiting: int
    calls: Counts[tuple[int, str]]
    failures: Counts[tuple[str, str]]

    def load(self) -> list[tuple[int, float]]:
        """Return the calls in progress and the busy seconds of each actor."""
        ...


class Exporter(Collector):
    """Prometheus collector of the metrics in `prometheus_metrics` for one run.

    `listen` opens the port, if one is configured.
    """

    def __init__(self, run: str) -> None:
        """Start all counters at zero; `listen` opens the port."""
        disable_created_metrics()  # creation timestamps of counters are not used
        self._run, self._registry = run, CollectorRegistry()
        self._metrics = {m.name: self._make(m) for m in METRICS if m.name not in READ_AT_SCRAPE}
        self._pools: dict[str, list[PoolStats]] = {}
        self._learner_restarts = 0
        self._server: Any = None
        self._targets: Path | None = None
        self._end_time, self._end_scraped = 0.0, threading.Event()
        self._scrape_times: deque[float] = deque(maxlen=2)  # of the last two, monotonic
        self._registry.register(self)
        for name in ("orchard_start_timestamp_seconds", "orchard_checkpoint_timestamp_seconds"):
            self.set(name, time.time())

    def attach(self, name: str, pool: PoolStats) -> None:
        """Export a pool; its counters continue those of earlier pools of the same name."""
        self._pools.setdefault(name, []).append(pool)

    def set(self, name: str, value: SupportsFloat, *labels: str) -> None:
        """Set a gauge of `METRICS`."""
        self._metrics[name].labels(self._run, *labels).set(float(value))

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """Export the logged metrics of one step; names outside `METRICS` are ignored."""
        now = time.time()
        if step:
            self._metrics["orchard_steps_total"].labels(self._run, phase).inc()
            self.set("orchard_last_step_timestamp_seconds", now, phase)
        self.set("orchard_step", step, phase)
        for name, value in values.items():
            if not math.isfinite(value):
                self._metrics["orchard_non_finite_total"].labels(self._run, name).inc()
            for metric, labels in find(name):
                self._observe(metric, labels, value)
        self._learner_restarts = int(values.get("learner/restarts", self._learner_restarts))

    def listen(self, settings: ClusterConfig, run_dir: Path) -> int | None:
        """Serve `/metrics`, write the address to the run folder, and return the port.

        Returns None if no port is configured.

        Raises:
            ConfigError: the port is in use, or the host is not an address of this machine.
        """
        port, host = settings.metrics_port, settings.metrics_host
        if port is None:
            return None
        try:
            server, _ = start_http_server(port, host, self._registry)
        except OSError as error:
            raise ConfigError(
                f"cluster.metrics_port = {port} on {host} cannot be opened: {error}; "
                "take another, or 0 for any that is free"
            ) from error
        self._server, port = server, int(server.server_port)
        self._targets = run_dir / TARGETS
        self._targets.parent.mkdir(parents=True, exist_ok=True)
        # A remote scraper needs an address of this machine, not the wildcard address.
        address = get_node_ip_address() if host in ("", "0.0.0.0", "::") else host
        target = {"targets": [f"{address}:{port}"], "labels": {"job": "orchard"}}
        self._targets.write_text(json.dumps([target]) + "\n")
        return port

    def close(self) -> None:
        """Export the end of the run, stop listening, and remove the address from the run folder.

        Where a Prometheus scrapes, this waits for its next scrape, up to `LAST_SCRAPE_S`: a run
        whose end was never scraped is taken for one that was killed.
        """
        self._end_time = time.time()
        try:
            if self._server is not None and self._end_scraped.wait(self._until_next_scrape()):
                time.sleep(0.5)  # the answer that names the end is still on its way
        finally:  # also where a second signal ends the wait
            self._stop()

    def _stop(self) -> None:
        """Stop listening and remove the address, without a word of an end."""
        if self._server is not None:
            # In a separate thread, since shutdown waits for the request in progress.
            threading.Thread(target=self._server.shutdown, daemon=True).start()
            self._server.server_close()
            self._server = None
        if self._targets is not None:
            self._targets.unlink(missing_ok=True)

    def collect(self) -> Iterable[Any]:
        """Return the current state of the pools; called by the Prometheus client at each scrape."""
        families = {name: self._family(BY_NAME[name]) for name in READ_AT_SCRAPE}
        self._scrape_times.append(time.monotonic())

        def add(name: str, value: SupportsFloat, *labels: str) -> None:
            families[name].add_metric([self._run, *labels], float(value))

        end_time = self._end_time
        add("orchard_end_timestamp_seconds", end_time)
        add("orchard_restarts_total", self._learner_restarts, "learner")
        for name, pools in list(self._pools.items()):  # the event loop may add one concurrently
            newest = pools[-1]
            add("orchard_restarts_total", sum(pool.restarts for pool in pools), name)
            add("orchard_pool_actors", len(newest.load()), name)
            add("orchard_pool_waiting", newest.waiting, name)
            for index, (in_progress, _) in enumerate(newest.load()):
                add("orchard_pool_in_hand", in_progress, name, str(index))
            for actor in range(max(len(pool.load()) for pool in pools)):
                busy = (load[actor][1] for p in pools if len(load := p.load()) > actor)
                add("orchard_pool_busy_seconds_total", sum(busy), name, str(actor))
            for (actor, method), calls in _total([p.calls for p in pools]).items():
                add("orchard_pool_calls_total", calls, name, str(actor), method)
            failures = _total([p.failures for p in pools])
            methods = {method for pool in pools for _, method in list(pool.calls)}
            # Export zeros: a counter that first appears with a failure shows no increase.
            zeros = {(method, reason): 0 for method in methods for reason in REASONS}
            for (method, reason), count in (zeros | failures).items():
                add("orchard_pool_failures_total", count, name, method, reason)
        if end_time:
            self._end_scraped.set()
        return families.values()

    def _until_next_scrape(self) -> float:
        """Return how long to wait for the next scrape, in seconds; 0 if nobody scrapes."""
        if not self._scrape_times:
            return 0.0
        first, last = self._scrape_times[0], self._scrape_times[-1]
        interval = last - first if last > first else LAST_SCRAPE_S
        # One scrape may be late; a scraper that missed two is gone.
        left = 2 * interval - (time.monotonic() - last)
        return min(max(left, 0.0), LAST_SCRAPE_S)

    def describe(self) -> Iterable[Any]:
        """Return nothing, so that registration does not call `collect`."""
        return ()

    def _observe(self, metric: Metric, labels: tuple[str, ...], value: float) -> None:
        """Apply a logged value to a metric; counters and histograms skip invalid values."""
        child = self._metrics[metric.name].labels(self._run, *labels)
        if metric.kind == "gauge":
            child.set(value)
        elif math.isfinite(value) and value >= 0:
            child.inc(value) if metric.kind == "counter" else child.observe(value)

    def _make(self, metric: Metric) -> Any:
        labels = ("run", *metric.labels)
        if metric.kind == "histogram":
            return Histogram(
                metric.name, metric.help, labels, registry=self._registry, buckets=metric.buckets
            )
        kind = Counter if metric.kind == "counter" else Gauge
        return kind(metric.name, metric.help, labels, registry=self._registry)

    def _family(self, metric: Metric) -> Any:
        kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
        return kind(metric.name, metric.help, labels=("run", *metric.labels))


def _total(counts: Iterable[Mapping[tuple[Any, str], int]]) -> dict[tuple[Any, str], int]:
    """Add the counts of several pools, from copies, since the event loop keeps counting."""
    total: dict[tuple[Any, str], int] = {}
    for pool_counts in counts:
        for key, count in dict(pool_counts).items():
            total[key] = total.get(key, 0) + count
    return total
