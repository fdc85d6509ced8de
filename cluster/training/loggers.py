"""Open the metrics logger of a run with its Prometheus exporter and its experiment tracker."""

from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager

from cluster.monitoring.exporter import Exporter
from cluster.training.run import Run
from orchard.tracking.metrics_log import MetricsLogger, MetricsSink
from orchard.tracking.trackers import open_tracker


@contextmanager
def open_loggers(run: Run) -> Generator[tuple[MetricsLogger, Exporter]]:
    """Open the metrics logger of a run, its Prometheus exporter, and its tracker if configured.

    Raises:
        ConfigError: the tracker's package is not installed.
    """
    kind = run.config.cluster.tracker
    with ExitStack() as stack:
        exporter = stack.enter_context(closing(Exporter(run.config.name)))
        sinks: list[MetricsSink] = [exporter.log]
        if kind is not None and run.phase != "evaluate":  # an evaluation logs nothing
            config = run.config.model_dump(mode="json")
            tracker = open_tracker(kind, run.dir, run.config.name, config)
            sinks.append(stack.enter_context(closing(tracker)).log)
        yield stack.enter_context(MetricsLogger(run.dir, sinks)), exporter
