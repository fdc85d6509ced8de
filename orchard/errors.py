"""Everything that Orchard raises on purpose.

    OrchardError
    ├── ConfigError        a run that cannot work as written
    ├── DataError          a file or row that cannot be used
    │   └── CatalogError     items or semantic IDs that do not fit together
    ├── CheckpointError    a checkpoint or policy that belongs to something else
    ├── EngineError        a decoder that cannot serve the request
    │   └── UnfitError         a decoder that computes something else than its weights say
    ├── ActorError         a remote part that died, hung or answered wrongly
    └── Stopped            a run that was asked to stop, and did in order

Each message names the value, the bound and the remedy; the command line prints it and exits with 2.
"""


class OrchardError(Exception):
    """Base of every error that a user can act on."""


class ConfigError(OrchardError):
    """The configuration names something unknown, contradictory or out of bounds."""


class DataError(OrchardError):
    """A data file is missing, unreadable, or holds a row that cannot be used."""


class CatalogError(DataError):
    """Items, semantic IDs or titles do not form a catalog."""


class CheckpointError(OrchardError):
    """A checkpoint or exported policy does not belong to this run, model or catalog."""


class EngineError(OrchardError):
    """A decoding engine cannot be built, or a request does not fit it."""


class WeightMismatchError(EngineError):
    """A holder of weights answers a probe otherwise than the learner; its pool replaces it."""


class ActorError(OrchardError):
    """A rollout, reward or learner actor died, missed its deadline or answered wrongly."""


class RunInterrupted(OrchardError):
    """The run was told to stop (SIGTERM); what it has done is saved."""
