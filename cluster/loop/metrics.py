"""Metrics of a round."""

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
