"""Experiment trackers beside the run's own log: Weights & Biases and MLflow.

Both come with the optional extra `tracking` and are imported when they are asked for. The run's
own `metrics.jsonl` stays the truth: steps that are done again after a resume are logged again.
"""

import importlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from orchard.errors import ConfigError

_NOT_IN_MLFLOW = re.compile(r"[^\w\-. /]")


@runtime_checkable
class Tracker(Protocol):
    """What a metrics logger may tell as well."""

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """One step of a phase, of which finite values are kept; phases count their own steps."""
        ...

    def close(self) -> None:
        """Send what is left."""
        ...


class WandbTracker:
    """Offline below the run folder, unless WANDB_MODE says otherwise; `wandb sync` uploads it."""

    def __init__(
        self, library: Any, run_dir: Path, name: str, config: Mapping[str, object]
    ) -> None:
        """Begin a W&B run."""
        self._run = library.init(
            project=os.environ.get("WANDB_PROJECT", "orchard"),
            name=name,
            dir=str(run_dir),
            mode=os.environ.get("WANDB_MODE", "offline"),
            config=dict(config),
        )
        self._phases: set[str] = set()

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """One point of each value, over the phase's own steps."""
        if phase not in self._phases:
            self._phases.add(phase)
            self._run.define_metric(f"{phase}/step")
            self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
        named = {f"{phase}/{name}": value for name, value in finite(values).items()}
        self._run.log({**named, f"{phase}/step": step})

    def close(self) -> None:
        """End the run."""
        self._run.finish()


class MlflowTracker:
    """To MLFLOW_TRACKING_URI, or to a database below the run folder."""

    def __init__(
        self, library: Any, run_dir: Path, name: str, config: Mapping[str, object]
    ) -> None:
        """Begin an MLflow run."""
        if "MLFLOW_TRACKING_URI" not in os.environ:
            library.set_tracking_uri(f"sqlite:///{(run_dir / 'mlflow.db').resolve()}")
        library.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "orchard"))
        self._library = library
        library.start_run(run_name=name)
        library.log_params(dict(_flat(config)))

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """One point of each value; `@` and other signs that MLflow refuses become `_at_` or `_`."""
        named = {
            _NOT_IN_MLFLOW.sub("_", f"{phase}/{name}".replace("@", "_at_")): value
            for name, value in finite(values).items()
        }
        self._library.log_metrics(named, step=step)

    def close(self) -> None:
        """End the run."""
        self._library.end_run()


TRACKERS: Mapping[str, Callable[[Any, Path, str, Mapping[str, object]], Tracker]] = {
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
}
"""By the name of the package. To add one, add a class that is a `Tracker`, and its name to
`cluster.tracker`."""


def open_tracker(
    kind: str, run_dir: Path, name: str, config: Mapping[str, object], *, library: Any = None
) -> Tracker:
    """A tracker of that kind.

    Args:
        kind: a key of `TRACKERS`.
        run_dir: where it keeps its files.
        name: of the run.
        config: the resolved run, as plain values.
        library: the package; imported by default.

    Raises:
        ConfigError: the package is not installed.
    """
    if library is None:
        try:
            library = importlib.import_module(kind)
        except ImportError as error:
            raise ConfigError(
                f'cluster.tracker = "{kind}" needs the package {kind}, which cannot be imported '
                f"({error}); install the extra `tracking`, or leave the setting out"
            ) from error
    return TRACKERS[kind](library, run_dir, name, config)


def _flat(config: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted keys and values; what is not set has none."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(cast(Mapping[str, object], value), f"{prefix}{name}.")
        elif value is not None:
            yield prefix + name, value


def finite(values: Mapping[str, float]) -> dict[str, float]:
    """The values that a tracker can draw."""
    return {name: value for name, value in values.items() if math.isfinite(value)}
