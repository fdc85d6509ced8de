"""Send the metrics of a run to experiment trackers: Weights & Biases and MLflow.

Both come with the optional extra `tracking` and are imported only if configured. The run's
`metrics.jsonl` stays authoritative: steps that are repeated after a resume are logged again.
"""

import importlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from orchard.errors import ConfigError
from orchard.registry import Facts, Registry

_NOT_IN_MLFLOW = re.compile(r"[^\w\-. /]")


@runtime_checkable
class Tracker(Protocol):
    """Experiment tracker that receives the metrics of a run."""

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """Log the finite values of one step; each phase counts its own steps."""
        ...

    def close(self) -> None:
        """Send pending values and end the run."""
        ...


TRACKERS: Registry[Callable[[Any, Path, str, Mapping[str, object]], Tracker], Facts] = Registry(
    "tracker", ("cluster.tracker",), Facts()
)
"""Trackers by the name of their package, as in `cluster.tracker`."""


@TRACKERS.register("wandb")
class WandbTracker:
    """W&B tracker, offline in the run folder unless WANDB_MODE is set; `wandb sync` uploads it."""

    def __init__(
        self, library: Any, run_dir: Path, name: str, config: Mapping[str, object]
    ) -> None:
        """Start a W&B run."""
        self._run = library.init(
            project=os.environ.get("WANDB_PROJECT", "orchard"),
            name=name,
            dir=str(run_dir),
            mode=os.environ.get("WANDB_MODE", "offline"),
            config=dict(config),
        )
        self._phases: set[str] = set()

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """Log one point of each finite value over the steps of the phase."""
        if phase not in self._phases:
            self._phases.add(phase)
            self._run.define_metric(f"{phase}/step")
            self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
        prefixed = {f"{phase}/{name}": value for name, value in finite(values).items()}
        self._run.log({**prefixed, f"{phase}/step": step})

    def close(self) -> None:
        """End the run."""
        self._run.finish()


@TRACKERS.register("mlflow")
class MlflowTracker:
    """MLflow tracker, to MLFLOW_TRACKING_URI or a database in the run folder."""

    def __init__(
        self, library: Any, run_dir: Path, name: str, config: Mapping[str, object]
    ) -> None:
        """Start an MLflow run."""
        if "MLFLOW_TRACKING_URI" not in os.environ:
            library.set_tracking_uri(f"sqlite:///{(run_dir / 'mlflow.db').resolve()}")
        library.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "orchard"))
        self._library = library
        library.start_run(run_name=name)
        library.log_params(dict(_flat(config)))

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """Log one point of each finite value; `@` becomes `_at_`, other illegal characters `_`."""
        prefixed = {
            _NOT_IN_MLFLOW.sub("_", f"{phase}/{name}".replace("@", "_at_")): value
            for name, value in finite(values).items()
        }
        self._library.log_metrics(prefixed, step=step)

    def close(self) -> None:
        """End the run."""
        self._library.end_run()


def open_tracker(
    kind: str, run_dir: Path, name: str, config: Mapping[str, object], *, library: Any = None
) -> Tracker:
    """Create a tracker of a kind.

    Args:
        kind: a key of `TRACKERS`.
        run_dir: folder for the tracker's files.
        name: name of the run.
        config: resolved configuration as plain values.
        library: the tracker's package; imported by default.

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
    """Yield dotted keys and values, without values that are None."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(cast(Mapping[str, object], value), f"{prefix}{name}.")
        elif value is not None:
            yield prefix + name, value


def finite(values: Mapping[str, float]) -> dict[str, float]:
    """Select the finite values."""
    return {name: value for name, value in values.items() if math.isfinite(value)}
