"""Exceptions that Orchard raises deliberately.

    OrchardError
    ├── ConfigError              a configuration that cannot work
    ├── DataError                a file or row that cannot be used
    │   └── CatalogError           inconsistent items or semantic IDs
    ├── CheckpointError          a checkpoint or policy of another run, model or catalog
    ├── UpdateError              an update that is not finite and was not applied
    ├── EngineError              a decoding engine that cannot serve the request
    │   └── WeightMismatchError    an engine whose outputs contradict its weights
    ├── ActorError               a remote actor that died, hung or returned a wrong result
    │   └── WeightsLostError       weights that were lost with the process that stored them
    └── RunInterrupted           a run that was stopped by a signal and saved its state

Each message names the value, the bound and the remedy; the command line prints it and exits with 2.
The `code` of an error is for programs and stays the same when its message is reworded: `AREA.KIND`,
such as `config.unknown_key`.
"""

from typing import ClassVar


class OrchardError(Exception):
    """Base class of every error that a user can act on."""

    default_code: ClassVar[str] = "orchard.error"
    """Code of the errors of this class that are raised without one."""

    def __init__(self, *args: object, code: str | None = None) -> None:
        """Make the error of a message, with the code of its class unless `code` replaces it."""
        super().__init__(*args)
        self.code = code or self.default_code
        """Stable code of the error, such as `config.unknown_key`."""


class ConfigError(OrchardError):
    """The configuration contains an unknown key, a contradiction or a value out of bounds."""

    default_code = "config.invalid"


class DataError(OrchardError):
    """A data file is missing or unreadable, or contains a row that cannot be used."""

    default_code = "data.invalid"


class CatalogError(DataError):
    """Items, semantic IDs or titles do not form a catalog."""

    default_code = "catalog.invalid"


class CheckpointError(OrchardError):
    """A checkpoint or exported policy does not belong to this run, model or catalog."""

    default_code = "checkpoint.mismatch"


class UpdateError(OrchardError):
    """The loss, the gradient or the weights of an update are not finite."""


class EngineError(OrchardError):
    """A decoding engine cannot be created, or a request exceeds its limits."""

    default_code = "engine.failed"


class WeightMismatchError(EngineError):
    """An engine disagrees with the learner on a weight probe; its actor pool replaces it."""

    default_code = "engine.weight_mismatch"


class ActorError(OrchardError):
    """A rollout, reward or learner actor died, missed its deadline or returned a wrong result."""

    default_code = "actor.failed"


class WeightsLostError(ActorError):
    """Published weights were lost with the process that stored them, and can be published again."""

    default_code = "actor.weights_lost"


class RunInterrupted(OrchardError):
    """The run was stopped by SIGTERM, after it saved its progress."""

    default_code = "run.interrupted"
