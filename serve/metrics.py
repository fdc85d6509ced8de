"""Metrics of an endpoint, under their Prometheus names; `serve.app` exports them through Ray.

| name | kind | tags |
|---|---|---|
| orchard_serve_requests | counter | variant, source, policy |
| orchard_serve_fallbacks | counter | variant, reason |
| orchard_serve_cache_hits | counter | variant |
| orchard_serve_prefix_hits | counter | variant: histories that continued a kept one |
| orchard_serve_prefix_tokens | counter | variant: prompt tokens that were not forwarded again |
| orchard_serve_prefix_bytes | gauge | variant: size of the kept keys and values |
| orchard_serve_illegal | counter | variant: illegal items in an answer; must stay 0 |
| orchard_serve_refused | counter | kind |
| orchard_serve_phase_seconds | histogram | variant, phase: queue, prefill, levels, post, total |
| orchard_serve_beam_fill | histogram | variant: beam rows of a batch over the budget |
| orchard_serve_queue_rows | gauge | |
| orchard_serve_policy_step | gauge | variant |
| orchard_serve_policy_refused | gauge | variant: 1 while the policy in the folder is refused |
| orchard_serve_catalogue_version | gauge | |
| orchard_serve_catalogue_refused | gauge | 1 while the last delta of the ledger is refused |
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

COUNTERS = {
    "orchard_serve_requests": ("variant", "source", "policy"),
    "orchard_serve_fallbacks": ("variant", "reason"),
    "orchard_serve_cache_hits": ("variant",),
    "orchard_serve_prefix_hits": ("variant",),
    "orchard_serve_prefix_tokens": ("variant",),
    "orchard_serve_illegal": ("variant",),
    "orchard_serve_refused": ("kind",),
}
HISTOGRAMS = {
    "orchard_serve_phase_seconds": ("variant", "phase"),
    "orchard_serve_beam_fill": ("variant",),
}
GAUGES = {
    "orchard_serve_queue_rows": (),
    "orchard_serve_prefix_bytes": ("variant",),
    "orchard_serve_policy_step": ("variant",),
    "orchard_serve_policy_refused": ("variant",),
    "orchard_serve_catalogue_version": (),
    "orchard_serve_catalogue_refused": (),
}
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@runtime_checkable
class ServeMetrics(Protocol):
    """Destination of the metrics."""

    def count(self, name: str, by: float = 1.0, **tags: str) -> None:
        """Increase a counter."""
        ...

    def observe(self, name: str, value: float, **tags: str) -> None:
        """Add an observation to a histogram."""
        ...

    def set(self, name: str, value: float, **tags: str) -> None:
        """Set a gauge."""
        ...


class InMemoryMetrics:
    """Metrics in memory, for tests and benchmarks."""

    def __init__(self) -> None:
        """Start with empty metrics."""
        self.counts = Counter[tuple[str, ...]]()
        self.values: dict[tuple[str, ...], list[float]] = defaultdict(list)
        self.gauges: dict[tuple[str, ...], float] = {}

    def count(self, name: str, by: float = 1.0, **tags: str) -> None:
        """Increase a counter."""
        self.counts[_key(name, COUNTERS[name], tags)] += int(by)

    def observe(self, name: str, value: float, **tags: str) -> None:
        """Add an observation to a histogram."""
        self.values[_key(name, HISTOGRAMS[name], tags)].append(value)

    def set(self, name: str, value: float, **tags: str) -> None:
        """Set a gauge."""
        self.gauges[_key(name, GAUGES[name], tags)] = value

    def total(self, name: str) -> int:
        """Return the sum of a counter over all tags."""
        return sum(n for key, n in self.counts.items() if key[0] == name)


def _key(name: str, tag_names: tuple[str, ...], tags: Mapping[str, str]) -> tuple[str, ...]:
    """Return the metric name and its tag values, in the declared order."""
    assert tags.keys() == set(tag_names), (name, tags)
    return (name, *(tags[tag] for tag in tag_names))
