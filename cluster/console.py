"""What a run shows on the screen: progress while it works, a table when it is done.

On a terminal both are drawn by rich; elsewhere (a log file, a job's output) progress is a line now
and then.
"""

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import SupportsFloat

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
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
"""Metrics that stand beside a progress bar, where a run has them."""

CLOSING = tuple(
    f"{metric}/{level}"
    for level in ("sid", "item")
    for metric in ("hr@1", "hr@3", "hr@10", "hr@50", "ndcg@3", "ndcg@10")
)
"""Metrics of the closing table, where an evaluation has them."""

FIRST = ("warm_start", "trained", "control")
"""Evaluations in the order of a run's life; any others follow by name."""

_LINE_EVERY_S = 10.0
_FILE_WIDTH = 120


class Progress:
    """How far a long work is, how fast it goes, and when it will be done.

        with Progress("training", total=300, done=120) as progress:
            ...
            progress.advance(metrics)

    The rate counts the steps of this sitting alone: what was `done` before says nothing of it.
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
        """Prepare to count from `done` to `total`; `shown` names the metrics to keep in view."""
        self.title, self.total, self.done = title, total, done
        self._shown, self._clock = tuple(shown), clock
        self._console = console or Console()
        self._resumed_at = done
        self._note: dict[str, float] = {}
        self._begin = self._said = clock()
        self._bars = self._bar = None
        if self._console.is_terminal:
            self._bars = Bars(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                _Said(self),
                console=self._console,
            )
            self._bar = self._bars.add_task(title, total=total, completed=done)

    def __enter__(self) -> "Progress":
        """Show the bar and start the clock."""
        self._begin = self._said = self._clock()
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the last state on the screen."""
        if self._bars is not None:
            self._bars.stop()
        elif self.done > self._resumed_at:
            self._say("stopped" if error else "done")

    def advance(
        self, metrics: Mapping[str, SupportsFloat] | None = None, *, count: int = 1
    ) -> None:
        """`count` more steps are done; metrics that are not given keep their last value."""
        self.done += count
        found = metrics or {}
        self._note |= {name: float(found[name]) for name in self._shown if name in found}
        if self._bars is not None and self._bar is not None:
            self._bars.update(self._bar, completed=self.done)
        elif self._clock() - self._said >= _LINE_EVERY_S:
            self._say()

    def summary(self) -> str:
        """Rate, time left, and the metrics in view."""
        elapsed_s = self._clock() - self._begin
        steps = self.done - self._resumed_at
        parts: list[str] = []
        if steps and elapsed_s > 0:
            rate = steps / elapsed_s
            parts.append(f"{rate:.2f}/s" if rate >= 1 else f"{1 / rate:.1f} s each")
            parts.append(f"{duration(max(0, self.total - self.done) / rate)} left")
        names = [(name.split("/", 1)[-1], value) for name, value in self._note.items()]
        return "  ".join([*parts, *(f"{name} {value:.4g}" for name, value in names)])

    def _say(self, state: str = "") -> None:
        now = self._clock()
        self._said = now
        parts = [f"{self.title} {self.done}/{self.total}", duration(now - self._begin)]
        line = "  ".join(part for part in [*parts, self.summary(), state] if part)
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class _Said(ProgressColumn):
    """The summary as a column of the bar."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def render(self, task: Task) -> Text:
        return Text(self._progress.summary(), style="dim")


def duration(seconds: float) -> str:
    """Seconds as a person says them: `8.4 s`, `12:07`, `3:12:07`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def in_order(names: Iterable[str]) -> list[str]:
    """Names of evaluations: the warm start first, then what came of it, then the rest."""
    return sorted(names, key=lambda n: (FIRST.index(n) if n in FIRST else len(FIRST), n))


def comparisons(names: Iterable[str]) -> list[tuple[str, str]]:
    """What is set against what: each against the first, and `trained` against `control`."""
    ordered = in_order(names)
    pairs = [(name, ordered[0]) for name in ordered[1:]]
    return [*pairs, ("trained", "control")] if {"trained", "control"} < set(ordered) else pairs


def metrics_of(evaluations: Iterable[Evaluation]) -> list[str]:
    """The closing metrics that at least one evaluation has."""
    known = {name for evaluation in evaluations for name in evaluation.metrics}
    return [name for name in CLOSING if name in known]


def interval(estimate: Estimate, *, signed: bool = False) -> str:
    """A mean and its interval, such as `.1027 [.0954, .1101]`."""
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
    """Print each evaluation with its intervals, the paired differences, and where the time went."""
    ordered = in_order(evaluations)
    metrics = metrics_of(evaluations.values())
    own = _table("Held-out rows: mean [95 % interval]", "metric", ordered)
    for metric in metrics:
        found = [evaluations[name].metrics.get(metric) for name in ordered]
        own.add_row(metric, *(interval(estimate) if estimate else "" for estimate in found))
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
    parts = [own, *([paired] if changes else []), *refused, *([times] if seconds else [])]
    screen = console or Console()
    if not screen.is_terminal:  # a file has no edge to wrap at
        screen.width = max(screen.width, _FILE_WIDTH)
    screen.print(Group(*parts))


def _table(title: str, what: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column(what)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _change(estimate: Estimate | None) -> Text:
    """A difference, coloured where its interval leaves zero out."""
    if estimate is None:
        return Text()
    style = ("green" if estimate.mean > 0 else "red") if estimate.significant else ""
    return Text(interval(estimate, signed=True), style=style)
