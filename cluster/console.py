"""Show the progress of a run and its closing table on the console.

On a terminal, rich draws both; elsewhere (a log file, a job's output) progress is a line every ten
seconds.
"""

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import SupportsFloat

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from orchard.errors import DataError
from orchard.evaluation.bootstrap import Estimate
from orchard.evaluation.ranking import Evaluation, difference

SHOWN = (
    "evaluate/ndcg@10/sid",
    "rewards/mean",
    "rewards/hit_rate",
    "learner/kl",
    "sft/loss",
    "sft/nll",
)
"""Metrics shown next to a progress bar, if the run has them."""

CLOSING = tuple(
    f"{metric}/{level}"
    for level in ("sid", "item")
    for metric in ("hr@1", "hr@3", "hr@10", "hr@50", "ndcg@3", "ndcg@10")
)
"""Metrics of the closing table, if an evaluation has them."""

FIRST = ("warm_start", "trained", "control")
"""Names of evaluations that are listed first, in this order; others follow by name."""

_LINE_EVERY_S = 10.0
_FILE_WIDTH = 120


class Progress:
    """Progress of a long task, with its rate, time left and metrics.

        with Progress("training", total=300, done=120) as progress:
            ...
            progress.advance(metrics)

    The rate counts only the steps of this process, not those already `done` at its start.
    """

    def __init__(
        self,
        title: str,
        *,
        total: int,
        done: int = 0,
        shown: Sequence[str] = SHOWN,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare to count from `done` to `total`; `shown` names the metrics to display."""
        self.title, self.total, self.done = title, total, done
        self._shown, self._clock = tuple(shown), clock
        self._console = console or Console()
        self._resumed_at = done
        self._values: dict[str, float] = {}
        self._begin = self._last_printed = clock()
        self._bars = self._bar = None
        if self._console.is_terminal:
            self._bars = Bars(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                _SummaryColumn(self),
                console=self._console,
            )
            self._bar = self._bars.add_task(title, total=total, completed=done)

    def __enter__(self) -> "Progress":
        """Show the bar and start the clock."""
        self._begin = self._last_printed = self._clock()
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leave the last state on the console."""
        if self._bars is not None:
            self._bars.stop()
        elif self.done > self._resumed_at:
            self._print_line("stopped" if kind else "done")

    def advance(
        self, metrics: Mapping[str, SupportsFloat] | None = None, *, count: int = 1
    ) -> None:
        """Count `count` more steps; metrics that are not passed keep their last value."""
        self.done += count
        new = metrics or {}
        self._values |= {name: float(new[name]) for name in self._shown if name in new}
        if self._bars is not None and self._bar is not None:
            self._bars.update(self._bar, completed=self.done)
        elif self._clock() - self._last_printed >= _LINE_EVERY_S:
            self._print_line()

    def summary(self) -> str:
        """Return the rate, the time left and the displayed metrics as one line."""
        elapsed_s = self._clock() - self._begin
        steps = self.done - self._resumed_at
        parts: list[str] = []
        if steps and elapsed_s > 0:
            rate = steps / elapsed_s
            parts.append(f"{rate:.2f}/s" if rate >= 1 else f"{1 / rate:.1f} s each")
            parts.append(f"{duration(max(0, self.total - self.done) / rate)} left")
        names = [(name.split("/", 1)[-1], value) for name, value in self._values.items()]
        return "  ".join([*parts, *(f"{name} {value:.4g}" for name, value in names)])

    def _print_line(self, state: str = "") -> None:
        now = self._clock()
        self._last_printed = now
        parts = [f"{self.title} {self.done}/{self.total}", duration(now - self._begin)]
        line = "  ".join(part for part in [*parts, self.summary(), state] if part)
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class _SummaryColumn(ProgressColumn):
    """The summary as a column of the bar."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def render(self, task: Task) -> Text:
        return Text(self._progress.summary(), style="dim")


def duration(seconds: float) -> str:
    """Format seconds as `8.4 s`, `12:07` or `3:12:07`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def in_order(names: Iterable[str]) -> list[str]:
    """Sort names of evaluations: those of `FIRST` in its order, then the rest by name."""
    return sorted(names, key=lambda n: (FIRST.index(n) if n in FIRST else len(FIRST), n))


def comparisons(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return the pairs to compare: each against the first, and `trained` against `control`."""
    ordered = in_order(names)
    pairs = [(name, ordered[0]) for name in ordered[1:]]
    return [*pairs, ("trained", "control")] if {"trained", "control"} < set(ordered) else pairs


def metrics_of(evaluations: Iterable[Evaluation]) -> list[str]:
    """Return the closing metrics that at least one evaluation has."""
    present = {name for evaluation in evaluations for name in evaluation.metrics}
    return [name for name in CLOSING if name in present]


def interval(estimate: Estimate, *, signed: bool = False) -> str:
    """Format a mean and its interval, such as `.1027 [.0954, .1101]`."""
    mean, low, high = (
        re.sub(r"^([+-]?)0\.", r"\1.", f"{value:{'+' if signed else ''}.4f}")
        for value in (estimate.mean, estimate.low, estimate.high)
    )
    return f"{mean} [{low}, {high}]"


def closing_table(
    evaluations: Mapping[str, Evaluation],
    *,
    seconds: Mapping[str, float],
    console: Console | None = None,
) -> None:
    """Print the evaluations with intervals, their paired differences, and seconds by phase."""
    ordered = in_order(evaluations)
    metrics = metrics_of(evaluations.values())
    levels = _table("Held-out rows: mean [95 % interval]", "metric", ordered)
    for metric in metrics:
        estimates = [evaluations[name].metrics.get(metric) for name in ordered]
        levels.add_row(metric, *(interval(estimate) if estimate else "" for estimate in estimates))
    changes: dict[str, dict[str, Estimate]] = {}
    refused: list[Text] = []
    for a, b in comparisons(ordered):
        try:
            changes[f"{a} - {b}"] = difference(evaluations[a], evaluations[b])
        except DataError as error:
            refused.append(Text(f"{a} - {b}: {error}"))
    paired = _table("Paired differences: mean [95 % interval]", "metric", list(changes))
    for metric in metrics:
        paired.add_row(metric, *(_change(change.get(metric)) for change in changes.values()))
    times = _table("Time", "phase", ["seconds"])
    for phase, value in seconds.items():
        times.add_row(phase, f"{value:.1f}")
    parts = [levels, *([paired] if changes else []), *refused, *([times] if seconds else [])]
    _print(Group(*parts), console)


def segment_table(
    name: str,
    segments: Mapping[str, Mapping[str, Estimate]],
    *,
    console: Console | None = None,
) -> None:
    """Print the metrics of each segment of an evaluation at semantic-ID level, with intervals."""
    metrics = [m for m in next(iter(segments.values()), {}) if m.endswith("/sid")]
    table = _table(f"{name}, by segment: mean [95 % interval]", "segment", ["rows", *metrics])
    for segment, estimates in segments.items():
        rows = next(iter(estimates.values())).n
        table.add_row(segment, str(rows), *(interval(estimates[metric]) for metric in metrics))
    _print(table, console)


def _print(content: RenderableType, console: Console | None) -> None:
    """Print tables on a console, by default standard output."""
    screen = console or Console()
    if not screen.is_terminal:  # a file does not wrap lines
        screen.width = max(screen.width, _FILE_WIDTH)
    screen.print(content)


def _table(title: str, row_heading: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column(row_heading)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _change(estimate: Estimate | None) -> Text:
    """Format a difference, colored if its interval excludes zero."""
    if estimate is None:
        return Text()
    style = ("green" if estimate.mean > 0 else "red") if estimate.significant else ""
    return Text(interval(estimate, signed=True), style=style)
