"""Checks of a configuration against the registries that it names entries of."""

from typing import Any

from cluster.training.rllib import RllibBackend
from cluster.training.text_policy import thinks
from learner.advantage.estimators import ESTIMATORS
from orchard.errors import ConfigError
from orchard.guide.registry import EXPERTS
from orchard.registry import Registry, Rule, import_plugins
from orchard.scorers.fit_critic import CRITIC_BACKENDS
from orchard.settings import Config
from orchard.tracking.trackers import TRACKERS
from rewards.registry import REWARDS
from rollout.engine.registry import ENGINES
from rollout.search.registry import SEARCHES

CRITIC_BACKENDS.register("rllib")(RllibBackend)  # may name Ray, which `orchard` may not

REGISTRIES: tuple[Registry[Any, Any], ...] = (
    SEARCHES, ENGINES, ESTIMATORS, REWARDS, TRACKERS, CRITIC_BACKENDS, EXPERTS,
)  # fmt: skip
"""Registries that settings name entries of."""


def check_names(config: Config) -> None:
    """Import the plugins of a run, and check the names in its settings and what they need.

    Raises:
        ConfigError: a plugin is missing, a name is unknown, or an entry does not fit the settings.
    """
    import_plugins(config.plugins)
    for registry in REGISTRIES:
        registry.check(config)
    for rule in RULES:
        rule(config)


def choices() -> dict[str, tuple[str, ...]]:
    """Return the names that each setting of a registry may have."""
    return {setting: tuple(registry) for registry in REGISTRIES for setting in registry.settings}


def _thoughts_need_one_depth(config: Config) -> None:
    """Refuse items of other than fixed depth for a policy that thinks before each code."""
    if thinks(config) and (config.data.titles or config.data.varying_depth):
        raise ConfigError(
            "a policy that thinks has a block for each code, and so needs semantic IDs of one "
            "length; set data.titles = data.varying_depth = false",
            code="config.thoughts_of_varying_depth",
        )


def _think_only_needs_thoughts(config: Config) -> None:
    """Refuse to learn from thoughts alone without thoughts."""
    if config.learner.sapo.think_only and not SEARCHES.facts(config.rollout.search).thinks:
        raise ConfigError(
            "learner.sapo.think_only = true leaves nothing to learn without thoughts; set "
            'rollout.search = "think"',
            code="config.think_only_without_thoughts",
        )


RULES: tuple[Rule, ...] = (_thoughts_need_one_depth, _think_only_needs_thoughts)
"""Checks that need the facts of several packages."""
