"""Checks of a configuration against the registries that it names entries of."""

from typing import Any

from learner.advantage.estimators import ESTIMATORS
from orchard.registry import Registry, import_plugins
from orchard.settings import Config
from rewards.registry import REWARDS
from rollout.search.registry import SEARCHES

REGISTRIES: tuple[Registry[Any, Any], ...] = (SEARCHES, ESTIMATORS, REWARDS)
"""Registries that settings name entries of."""


def check_names(config: Config) -> None:
    """Import the plugins of a run, and check the names in its settings.

    Raises:
        ConfigError: a plugin is missing, a name is unknown, or an entry does not fit the settings.
    """
    import_plugins(config.plugins)
    for registry in REGISTRIES:
        registry.check(config)
