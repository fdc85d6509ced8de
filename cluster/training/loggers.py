"""What a run leaves in writing while it goes: its logbook, and who else hears of every step."""

from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager

from cluster.monitoring.exporter import Exporter
from cluster.training.run import Run
from orchard.tracking.metrics_log import Listener, Logbook
from orchard.tracking.trackers import open_tracker


@contextmanager
def records(run: Run) -> Generator[tuple[Logbook, Exporter]]:
    """The logbook of a run; an exporter for Prometheus, and a tracker if one is set, listen to it.

    Raises:
        ConfigError: the tracker's package is not installed.
    """
    kind = run.config.cluster.tracker
    with ExitStack() as stack:
        exporter = stack.enter_context(closing(Exporter(run.config.name)))
        also: list[Listener] = [exporter.log]
        if kind is not None and run.phase != "evaluate":  # which logs nothing
            config = run.config.model_dump(mode="json")
            tracker = open_tracker(kind, run.dir, run.config.name, config)
            also.append(stack.enter_context(closing(tracker)).log)
        yield stack.enter_context(Logbook(run.dir, also)), exporter
