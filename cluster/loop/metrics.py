"""Metrics of a round, and the rows of its table in a report."""

from collections.abc import Mapping
from typing import Any

from cluster.loop.state import RoundState


def round_metrics(state: RoundState) -> dict[str, float]:
    """Return the metrics of a round that has ended, by the names of `prometheus_metrics`."""
    counts = state.counts or {}
    metrics = {
        "loop/seconds_s": state.seconds,
        "loop/window_requests": counts.get("requests", 0.0),
        "loop/window_exposures": counts.get("exposures", 0.0),
        "loop/window_events": counts.get("window_events", 0.0),
        "loop/late_events": counts.get("late_events", 0.0),
        "loop/requests_failed": counts.get("requests_failed", 0.0),
        "loop/published": float(state.outcome == "published"),
        "loop/refused": float(state.outcome == "refused"),
        "loop/skipped": float(state.outcome == "skipped"),
        "loop/promoted": float(state.promoted),
        "loop/rolled_back": float(state.rolled_back),
        "loop/outside": float(state.watch in ("below", "above")),
    }
    for name, estimate in (
        ("reward", state.reward), ("realized", state.realized), ("predicted", state.predicted),
        ("serving", state.serving),
    ):  # fmt: skip
        if estimate is not None:
            metrics[f"loop/{name}"] = estimate.mean
            metrics[f"loop/{name}_low"] = estimate.low
            metrics[f"loop/{name}_high"] = estimate.high
    if "delay_median_s" in counts:
        metrics["loop/event_delay_seconds"] = counts["delay_median_s"]
    return metrics


def drift(states: list[RoundState]) -> float | None:
    """Return the change of the main policy's reward per draw between the last two windows.

    None unless both windows have an estimate of the same policy.
    """
    told = [state for state in states if state.serving is not None]
    if len(told) < 2 or told[-1].main != told[-2].main:
        return None
    last, before = told[-1].serving, told[-2].serving
    return None if last is None or before is None else last.mean - before.mean


def table_row(row: Mapping[str, Any]) -> list[str]:
    """Return a row of the report's table from a row of the log; see `HEADINGS`."""
    counts: Mapping[str, Any] = row.get("counts") or {}
    return [
        str(row["number"]), f"{counts.get('requests', 0):g}", _interval(row.get("reward")),
        _interval(row.get("realized")), _interval(row.get("expected")), str(row.get("watch") or ""),
        _interval(row.get("predicted")), _interval(row.get("serving")),
        str(row.get("outcome") or ""), "; ".join(row.get("reasons") or ()),
    ]  # fmt: skip


HEADINGS = (
    "round", "requests", "reward per request", "realized per draw", "expected", "place",
    "predicted for the next", "served policy, off-policy", "outcome", "reasons",
)  # fmt: skip
"""Headings of the report's table."""


def _interval(estimate: Mapping[str, float] | None) -> str:
    if estimate is None:
        return ""
    return f"{estimate['mean']:.4f} [{estimate['low']:.4f}, {estimate['high']:.4f}]"
