"""Exceptions that Orchard raises deliberately.

    OrchardError
    ├── ConfigError              a configuration that cannot work
    ├── DataError                a file or row that cannot be used
    │   └── CatalogError           inconsistent items or semantic IDs
    ├── CheckpointError          a checkpoint or policy of another run, model or catalog
    ├── EngineError              a decoding engine that cannot serve the request
    │   └── WeightMismatchError    an engine whose outputs contradict its weights
    ├── ActorError               a remote actor that died, hung or returned a wrong result
    └── RunInterrupted           a run that was stopped by a signal and saved its state

Each message names the value, the bound and the remedy; the command line prints it and exits with 2.
"""


class OrchardError(Exception):
    """Base class of every error that a user can act on."""


class ConfigError(OrchardError):
    """The configuration contains an unknown key, a contradiction or a value out of bounds."""


class DataError(OrchardError):
    """A data file is missing or unreadable, or contains a row that cannot be used."""


class CatalogError(DataError):
    """Items, semantic IDs or titles do not form a catalog."""


class CheckpointError(OrchardError):
    """A checkpoint or exported policy does not belong to this run, model or catalog."""


class EngineError(OrchardError):
    """A decoding engine cannot be created, or a request exceeds its limits."""


class WeightMismatchError(EngineError):
    """An engine disagrees with the learner on a weight probe; its actor pool replaces it."""


class ActorError(OrchardError):
    """A rollout, reward or learner actor died, missed its deadline or returned a wrong result."""


class RunInterrupted(OrchardError):
    """The run was stopped by SIGTERM, after it saved its progress."""
