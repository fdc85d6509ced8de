"""Collect the feedback of one window: who visits, what was shown, what they did.

Exposures come from the log of the endpoint, events from a source that is kept in an event store.
Simulated users visit the endpoint first, and their events take the same way as those of real ones.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from cluster.loop.rounds import Collected
from cluster.loop.state import RoundState
from orchard.errors import DataError
from orchard.feedback.event_store import BEGINNING, EventStore, WindowEnd
from orchard.feedback.join import JoinOptions, join
from orchard.feedback.read import read_exposures
from orchard.feedback.schema import EXPOSURES, FEEDBACK
from orchard.feedback.stream import EventSource
from orchard.feedback.write import write_feedback
from orchard.settings.loop import LoopConfig
from orchard.simulation.clients import Asking, visit, write_events
from orchard.simulation.simulator import LOOK_S, Simulator

_log = logging.getLogger("orchard")
_FLUSH_S = 60.0
"""Seconds to wait for the endpoint to write what it has shown."""
_PAUSE_S = 0.2


@dataclass(frozen=True, kw_only=True)
class SimulatedUsers:
    """Users who are simulated, and the folder that keeps the events of their windows."""

    simulator: Simulator
    asking: Asking
    visits: Path
    """Folder with one file of events per window; it may be the source of events itself."""
    deliver: Callable[[pl.DataFrame], None] | None = None
    """Sends the events to another source."""

    def restore(self, number: int) -> None:
        """Let the users remember the windows before a round, which an earlier process simulated."""
        for window in range(number):
            path = self._path(window)
            if path.is_file():
                self.simulator.remember(pl.read_parquet(path))

    def visit(self, number: int) -> tuple[int, int]:
        """Let the users of a window visit; return the number of answered and failed requests.

        A window that an earlier process simulated to its end is not simulated again.
        """
        path = self._path(number)
        if path.is_file():
            self.simulator.remember(pl.read_parquet(path))
            return 0, 0
        answered = visit(self.simulator, number, self.asking)
        if self.deliver is not None:
            self.deliver(answered.events)
        write_events(self.visits, path.stem, answered.events)
        return len(answered.visits) - answered.failed, answered.failed

    def _path(self, number: int) -> Path:
        return self.visits / f"window-{number:05d}.parquet"


@dataclass(frozen=True, kw_only=True)
class Collector:
    """Collector of the windows of a loop."""

    settings: LoopConfig
    exposures: Path
    """Folder of the exposure log."""
    feedback: Path
    """Folder with one feedback folder per round."""
    source: EventSource
    store: EventStore
    start: float
    """Time at which the first window of real users begins, in seconds since 1970."""
    users: SimulatedUsers | None = None
    """Simulated users; None if the users are real."""

    def folder(self, number: int) -> Path:
        """Return the feedback folder of a round."""
        return self.feedback / f"{number:05d}"

    def collect(self, state: RoundState, last: RoundState | None) -> Collected:
        """Collect the window of a round, which begins where that of the last round ended.

        Raises:
            DataError: the endpoint answers no request, or the source of events cannot be read.
        """
        begun = BEGINNING
        if last is not None:
            begun = WindowEnd(time=last.window_end, files=last.event_files)
        answered = failed = 0
        if self.users is not None:
            answered, failed = self.users.visit(state.number)
            time.sleep(LOOK_S * (self.settings.k + 2))  # the last event is not in the future
            end = time.time()
            self._wait_for_log(state.number, answered)
        else:
            end = max(begun.time, self.start) + self.settings.window_s
            self._wait_until(end + self.settings.lateness_s)
        self.store.ingest_all(self.source)
        ended = WindowEnd(time=end, files=self.store.num_files)
        window = self.store.window(begun, ended)
        counted = {
            "window_events": len(window.events), "late_events": window.late,
            "refused_events": self.store.refused, "requests_failed": failed,
        }  # fmt: skip
        counts = {name: float(count) for name, count in counted.items()}
        shown = self._shown(begun.time, end)
        if shown.is_empty():
            return Collected(
                rows=pl.DataFrame(schema=FEEDBACK), counts=counts, window_end=end,
                event_files=ended.files,
            )  # fmt: skip
        # Events on exposures of this window that came early for the next one belong to it as well.
        events = self.store.since(begun.time)
        options = JoinOptions(window=self.settings.attribution_s, bad_values="drop")
        joined = join(shown, events, options)
        for warning in joined.warnings:
            _log.warning("round %d: %s", state.number, warning)
        write_feedback(self.folder(state.number), joined, options, overwrite=True)
        counts |= {name: float(value) for name, value in joined.summary.items()}
        return Collected(rows=joined.rows, counts=counts, window_end=end, event_files=ended.files)

    def _shown(self, begin: float, end: float) -> pl.DataFrame:
        """Return the exposures of a window; of a request answered twice, the last answer."""
        if not any(self.exposures.glob("*.parquet")):
            return pl.DataFrame(schema=EXPOSURES)
        try:
            shown = read_exposures(self.exposures)
        except DataError as error:
            if error.code != "data.no_exposures":
                raise
            return pl.DataFrame(schema=EXPOSURES)
        inside = shown.filter(pl.col("time").is_between(begin, end, closed="left"))
        return inside.filter(pl.col("time") == pl.col("time").max().over("request_id"))

    def _wait_for_log(self, number: int, answered: int) -> None:
        """Wait until the endpoint has written the exposures of all answers of a window."""
        deadline = time.monotonic() + _FLUSH_S
        mine = pl.col("request_id").str.starts_with(f"w{number}-")
        while answered:
            written = 0
            if any(self.exposures.glob("*.parquet")):
                log = pl.scan_parquet(self.exposures / "*.parquet").filter(mine)
                written = int(log.select(pl.col("request_id").n_unique()).collect().item())
            if written >= answered:
                return
            if time.monotonic() > deadline:
                _log.warning(
                    "round %d: the exposure log holds %d of %d answers", number, written, answered
                )
                return
            time.sleep(_PAUSE_S)

    def _wait_until(self, moment: float) -> None:
        """Take events into the store until a time."""
        while (left := moment - time.time()) > 0:
            self.store.ingest_all(self.source)
            time.sleep(min(left, 1.0))
