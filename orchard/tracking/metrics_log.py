"""Log the metrics of a run by phase and step, and read them back.

`metrics.jsonl` has one JSON object per line and is authoritative; the TensorBoard event files in
`tensorboard/<phase>` are derived from it.

    {"step": 7, "time": 1760000000.0, "phase": "train", "values": {"rollout/search_s": 0.41}}

Shapes:  N entries of one metric
"""

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, SupportsFloat, cast

import numpy as np
from jaxtyping import Float64, Int64

from orchard.errors import DataError
from orchard.folders import atomic_write

FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"

MetricsSink = Callable[[str, int, Mapping[str, float]], object]
"""Callback with phase, step and values, which may be NaN or infinite."""

_FLUSH_S = 10
"""Seconds between flushes of TensorBoard's files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Values of one metric over the steps of one phase, in the order written."""

    step: Int64[np.ndarray, " N"]
    time: Float64[np.ndarray, " N"]
    """Seconds since 1970."""
    value: Float64[np.ndarray, " N"]
    """Value at each step, NaN if the measurement was not finite."""


class MetricsLogger:
    """Appending writer of a run's metrics, reopened on resume; not safe for several processes."""

    def __init__(self, run_dir: Path, also: Sequence[MetricsSink] = ()) -> None:
        """Open or create the log of `run_dir`, removing a last line truncated by a crash.

        The sinks in `also` receive every logged step after it is on disk.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run_dir = run_dir
        self._path = run_dir / FILE
        _mend(self._path)
        self._file = self._path.open("a", encoding="utf-8")
        self._events: dict[str, _Events] = {}
        self._also = tuple(also)

    def log(self, phase: str, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Write and flush one line; NaN and infinity become null.

        Args:
            phase: `sft` or `train`; each phase counts its own steps.
            step: number of completed updates.
            values: values by metric name, `group/quantity_unit`.
        """
        now = time.time()
        numbers = {name: float(value) for name, value in values.items()}
        entry = {
            "step": step,
            "time": round(now, 3),
            "phase": phase,
            "values": {n: v if math.isfinite(v) else None for n, v in numbers.items()},
        }
        self._file.write(json.dumps(entry, allow_nan=False) + "\n")
        self._file.flush()
        self._events_of(phase).scalars(step, now, numbers)
        for sink in self._also:
            sink(phase, step, numbers)

    def rewind(self, phase: str, step: int) -> int:
        """Remove the lines of `phase` after `step`, and return their number.

        A run that resumes from a checkpoint older than its last line will write those steps again.
        """
        kept: list[str] = []
        dropped = 0
        for line, entry in _entries(self._path):
            is_past = entry["phase"] == phase and entry["step"] > step
            dropped += is_past
            if not is_past:
                kept.append(line)
        if dropped:
            self._file.close()
            atomic_write(self._path, "".join(kept))
            self._file = self._path.open("a", encoding="utf-8")
            self._events_of(phase).purge(step + 1)
        return dropped

    def close(self) -> None:
        """Flush and close all files; further calls have no effect."""
        self._file.close()
        for events in self._events.values():
            events.close()
        self._events = {}

    def __enter__(self) -> "MetricsLogger":
        """Return the logger, whose files are open already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close all files."""
        self.close()

    def _events_of(self, phase: str) -> "_Events":
        if phase not in self._events:
            self._events[phase] = _Events(self._run_dir / TENSORBOARD / phase)
        return self._events[phase]


class _Events:
    """TensorBoard event file of one phase; each phase has one since it counts its own steps."""

    def __init__(self, folder: Path) -> None:
        # Imported here, since reading metrics needs no TensorBoard. Its message classes are
        # generated at import, invisibly to type checkers.
        protos, writer = "tensorboard.compat.proto", "tensorboard.summary.writer"
        event: Any = import_module(f"{protos}.event_pb2")
        summary: Any = import_module(f"{protos}.summary_pb2")
        event_file: Any = import_module(f"{writer}.event_file_writer")
        self._event, self._log, self._summary = event.Event, event.SessionLog, summary.Summary
        self._writer = event_file.EventFileWriter(str(folder), flush_secs=_FLUSH_S)

    def scalars(self, step: int, now: float, values: Mapping[str, float]) -> None:
        """Add the values of one step."""
        points = [self._summary.Value(tag=n, simple_value=v) for n, v in values.items()]
        summary = self._summary(value=points)
        self._writer.add_event(self._event(step=step, wall_time=now, summary=summary))

    def purge(self, step: int) -> None:
        """Make TensorBoard discard everything from `step` on."""
        log = self._log(status=self._log.START)
        self._writer.add_event(self._event(step=step, wall_time=time.time(), session_log=log))

    def close(self) -> None:
        """Flush the file and stop the writer's thread."""
        self._writer.close()


def read_metrics(path: Path) -> dict[str, dict[str, Series]]:
    """Read a `metrics.jsonl` as series by phase and metric; a truncated last line is ignored.

    Raises:
        DataError: the file is missing, or a line before the last is not an entry.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist; has the run logged anything?")
    points: dict[str, dict[str, list[tuple[int, float, float]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for _, entry in _entries(path):
        for name, value in entry["values"].items():
            point = (entry["step"], entry["time"], math.nan if value is None else value)
            points[entry["phase"]][name].append(point)
    return {
        phase: {name: _series(rows) for name, rows in by_name.items()}
        for phase, by_name in points.items()
    }


def _series(points: list[tuple[int, float, float]]) -> Series:
    step, when, value = zip(*points, strict=True)
    return Series(
        step=np.asarray(step, dtype=np.int64),
        time=np.asarray(when, dtype=np.float64),
        value=np.asarray(value, dtype=np.float64),
    )


def _entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each complete line with its parsed entry."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            entry = _entry(line)
            if entry is not None:
                yield line, entry
            elif line.endswith("\n"):
                raise DataError(
                    f"line {number} of {path} is not a logbook entry: {line[:60]!r}; remove it"
                )


def _entry(line: str) -> dict[str, Any] | None:
    """Parse one line; return None if it is not an entry."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    is_entry = isinstance(entry, dict) and {"step", "time", "phase", "values"} <= entry.keys()
    return cast(dict[str, Any], entry) if is_entry else None


def _mend(path: Path) -> None:
    """Make the file end with a complete line, so that appending does not join two lines."""
    if not path.exists():
        return
    text = path.read_bytes()
    tail = text[text.rfind(b"\n") + 1 :]
    if not tail:
        return
    if _entry(tail.decode(errors="replace")) is not None:
        with path.open("ab") as file:
            file.write(b"\n")
    else:
        with path.open("r+b") as file:
            file.truncate(len(text) - len(tail))
