"""Parts of dashboards. Panels of one row share its width; expressions are PromQL."""

from dataclasses import dataclass

WIDTH, HEIGHT = 24, 8
"""Columns of Grafana's grid, and the height of a panel in grid rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """Panel of curves over time."""

    title: str
    about: str
    unit: str
    """Grafana unit identifier."""
    curves: tuple[tuple[str, str], ...]
    """Expression and legend of each curve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """Grafana dashboard."""

    uid: str
    title: str
    rows: tuple[tuple[Graph, ...], ...]
    by_run: bool = True
    """Flag for dashboards with the variable `$run`."""


QUANTILES = ("0.50", "0.99")
"""Quantiles of histograms."""


def rate(metric: str, *by: str, only: str = "") -> str:
    """Return the rate of a counter per second, summed by run and labels."""
    labels = ", ".join(("run", *by))
    return f'sum by ({labels}) (rate({metric}{{run=~"$run"{only}}}[$__rate_interval]))'


def value(metric: str, only: str = "") -> str:
    """Return the expression of a gauge."""
    return f'{metric}{{run=~"$run"{only}}}'


def graph(title: str, unit: str, about: str, *curves: tuple[str, str]) -> Graph:
    """Return a panel of curves."""
    return Graph(title=title, about=about, unit=unit, curves=curves)


def one(title: str, unit: str, about: str, metric: str, legend: str = "{{run}}") -> Graph:
    """Return a panel of one gauge."""
    return graph(title, unit, about, (value(metric), legend))


def quantiles(metric: str) -> tuple[tuple[str, str], ...]:
    """Return the quantiles of a histogram."""
    buckets = f'sum by (run, le) (rate({metric}_bucket{{run=~"$run"}}[$__rate_interval]))'
    return tuple(
        (f"histogram_quantile({q}, {buckets})", f"{{{{run}}}} p{q[2:]}") for q in QUANTILES
    )


def by_node(title: str, unit: str, expression: str) -> Graph:
    """Return a panel with one curve per node."""
    title = f"{title} by node"
    return graph(title, unit, "From Ray's node agents.", (expression, "{{instance}}"))
