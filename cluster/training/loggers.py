"""Open the folder of a run for one command: its lock, its metrics logger, exporter and tracker."""

from collections.abc import Generator, Mapping
from contextlib import ExitStack, closing, contextmanager

from cluster import run_lock
from cluster.monitoring.exporter import Exporter
from cluster.training.checks import check_same_data, check_unchanged
from cluster.training.run import Run
from cluster.training.run_dir import open_run_dir
from orchard.tracking.metrics_log import MetricsLogger, MetricsSink
from orchard.tracking.trackers import open_tracker


@contextmanager
def open_loggers(run: Run) -> Generator[tuple[MetricsLogger, Exporter]]:
    """Lock and open the folder of a run, with its metrics logger, exporter and tracker.

    Raises:
        ConfigError: another command writes the folder, or has changed what the run would continue;
            the folder cannot be written; the tracker's package is not installed.
    """
    kind = run.config.cluster.tracker
    with ExitStack() as stack:
        lock = stack.enter_context(run_lock.hold(run.dir))
        if run.phase != "evaluate":  # what was checked before another command let go of the lock
            check_unchanged(run.config, run.phase)
            check_same_data(run.config, run.data)
        open_run_dir(run)

        def check_lock(phase: str, step: int, values: Mapping[str, float]) -> None:
            lock.check()

        exporter = stack.enter_context(closing(Exporter(run.config.name)))
        sinks: list[MetricsSink] = [check_lock, exporter.log]
        if kind is not None and run.phase != "evaluate":  # an evaluation logs nothing
            config = run.config.model_dump(mode="json")
            tracker = open_tracker(kind, run.dir, run.config.name, config)
            sinks.append(stack.enter_context(closing(tracker)).log)
        yield stack.enter_context(MetricsLogger(run.dir, sinks)), exporter
