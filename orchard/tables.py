"""Metrics and evaluations of a run as Arrow tables."""

from pathlib import Path
from typing import Any

import pyarrow as pa  # its types are unknown to type checkers: a table is Any here

from orchard.errors import DataError
from orchard.evaluation import ranking
from orchard.tracking import metrics_log


def read_metrics(run: str | Path) -> Any:
    """Return the metrics of a run folder, a row for each phase, step and metric.

    Columns: `phase`, `step`, `time` (seconds since 1970), `metric`, `value`.

    Raises:
        DataError: the folder holds no metrics, or they are damaged.
    """
    parts: list[Any] = [_METRICS.empty_table()]
    for phase, metrics in metrics_log.read_metrics(Path(run) / metrics_log.FILE).items():
        for name, series in metrics.items():
            length = len(series.step)
            columns = [[phase] * length, series.step, series.time, [name] * length, series.value]
            parts.append(pa.table(columns, schema=_METRICS))
    return pa.concat_tables(parts)


def read_evaluations(run: str | Path) -> Any:
    """Return the evaluations of a run folder, a row for each evaluation and metric.

    Columns: `evaluation`, `policy`, `metric`, `mean`, `low`, `high` (95 % bootstrap interval), `n`.

    Raises:
        DataError: the folder holds no evaluation, or one is damaged.
    """
    paths = sorted((Path(run) / "evaluation").glob("*.json"))
    if not paths:
        raise DataError(f"{run} holds no evaluation; run `orchard evaluate` first")
    rows = [
        {
            "evaluation": path.stem, "policy": str(evaluation.policy), "metric": name,
            "mean": estimate.mean, "low": estimate.low, "high": estimate.high, "n": estimate.n,
        }
        for path in paths
        for evaluation in [ranking.read(path)]
        for name, estimate in evaluation.metrics.items()
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=_EVALUATIONS)


_METRICS = pa.schema(
    [
        ("phase", pa.string()), ("step", pa.int64()), ("time", pa.float64()),
        ("metric", pa.string()), ("value", pa.float64()),
    ]
)  # fmt: skip
_EVALUATIONS = pa.schema(
    [
        ("evaluation", pa.string()), ("policy", pa.string()), ("metric", pa.string()),
        ("mean", pa.float64()), ("low", pa.float64()), ("high", pa.float64()), ("n", pa.int64()),
    ]
)  # fmt: skip
