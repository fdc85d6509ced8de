"""Check a configuration against the registries that it names, and against what its run has made."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from cluster.actors.session import runs_elsewhere
from cluster.training.rllib import RllibBackend
from cluster.training.text_policy import thinks
from learner.advantage.estimators import ESTIMATORS
from learner.surrogates import LOSSES
from orchard.catalog.trie import Trie
from orchard.config import differences, load
from orchard.errors import ConfigError
from orchard.guide.registry import EXPERTS
from orchard.registry import Registry, Rule, import_plugins
from orchard.scorers.fit_critic import CRITIC_BACKENDS
from orchard.settings import Config
from orchard.settings.data import DataConfig, data_root
from orchard.settings.widths import last, of_levels
from orchard.tracking.trackers import TRACKERS
from rewards.registry import REWARDS
from rollout.engine.registry import ENGINES
from rollout.search.registry import SEARCHES

CRITIC_BACKENDS.register("rllib")(RllibBackend)  # may name Ray, which `orchard` may not

Phase = Literal["sft", "train", "evaluate"]
"""Phase of a run."""

REGISTRIES: tuple[Registry[Any, Any], ...] = (
    SEARCHES, ENGINES, ESTIMATORS, LOSSES, REWARDS, TRACKERS, CRITIC_BACKENDS, EXPERTS,
)  # fmt: skip
"""Registries that settings name entries of."""


MAY_CHANGE = (
    "output", "data.path", "data.bundle", "sft.epochs", "sft.minutes", "sft.patience",
    "learner.steps",
    "rollout.actors", "rollout.max_restarts", "rollout.timeout_s", "rollout.start_timeout_s",
    "rollout.threads", "rewards.actors", "rewards.queue", "rewards.timeout_s", "rewards.retries",
    "rewards.max_restarts", "learner.threads", "learner.max_failures", "learner.timeout_s",
    "learner.start_timeout_s", "evaluate.", "guide.", "checkpoint.", "cluster.", "serve.", "loop.",
)  # fmt: skip
"""Settings that may differ between a run and its continuation: duration, resources and evaluation,
but nothing that changes an update."""
DATA_FILE = "data.json"
"""File in the run folder with the digests of the data that the run is made from."""
OF_RL = (
    "learner.",
    "rollout.",
    "rewards.",
    "critic.",
    "guide.",
    "plugins",
    "data.fresh",
    "data.feedback",
)
"""Settings that SFT does not use, which may change until RL has written a checkpoint."""


def check_names(settings: Config) -> None:
    """Import the plugins of a run, and check the names in its settings and what they need.

    Raises:
        ConfigError: a plugin is missing, a name is unknown, or an entry does not fit the settings.
    """
    import_plugins(settings.plugins)
    for registry in REGISTRIES:
        registry.check(settings)
    for rule in RULES:
        rule(settings)


def choices() -> dict[str, tuple[str, ...]]:
    """Return the names that each setting of a registry may have."""
    return {setting: tuple(registry) for registry in REGISTRIES for setting in registry.settings}


def check_engines(settings: Config, phase: Phase) -> None:
    """Raise EngineError if a needed engine cannot run on this machine; skip remote clusters.

    Without this check the error would appear only when the first actor starts.
    """
    if runs_elsewhere(settings.cluster):
        return
    engines = {settings.evaluate.engine}
    if phase == "train":
        engines.add(settings.rollout.engine)
    for name in engines:
        check_machine = ENGINES.facts(name).check_machine
        if check_machine is not None:
            check_machine()


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


def _anchor_needs_codes_alone(config: Config) -> None:
    """Refuse to anchor codes after thoughts that the policy has not had."""
    if config.learner.anchor and SEARCHES.facts(config.rollout.search).thinks:
        raise ConfigError(
            f"learner.anchor = {config.learner.anchor} learns the codes of the target right after "
            f"the prompt, and rollout.search = {config.rollout.search} has thoughts between them; "
            "leave one of them out",
            code="config.anchor_without_thought",
        )


def _logged_draws_have_an_estimator(config: Config) -> None:
    """Refuse an estimator of groups for logged draws, and one of logged draws for groups."""
    search, estimator = config.rollout.search, config.learner.estimator
    if SEARCHES.facts(search).logged == ESTIMATORS.facts(estimator).logged:
        return
    known = [name for name in ESTIMATORS if ESTIMATORS.facts(name).logged]
    raise ConfigError(
        f"rollout.search = {search} and learner.estimator = {estimator} do not fit: logged draws, "
        f'of the search "logged", are learned by the estimator {" or ".join(known)} alone',
        code="config.logged_draws",
    )


def _logged_draws_are_rewarded_by_the_log(config: Config) -> None:
    """Refuse utilities for logged draws, out of which their own rewards could not be taken."""
    uses = "utility" in config.rewards.weights or config.rewards.steps == "utility"
    if SEARCHES.facts(config.rollout.search).logged and uses:
        raise ConfigError(
            'rollout.search = "logged" learns from the logged rewards; set rewards.weights = '
            '{rule = 1.0} and rewards.steps = "match", or learn by utilities with another search',
            code="config.logged_draws",
        )


RULES: tuple[Rule, ...] = (
    _logged_draws_have_an_estimator,
    _logged_draws_are_rewarded_by_the_log,
    _thoughts_need_one_depth,
    _think_only_needs_thoughts,
    _anchor_needs_codes_alone,
)
"""Checks that need the facts of several packages."""


def recorded_data(run_dir: Path) -> dict[str, str]:
    """Return the digests of the data that a run folder was made from; empty if it names none.

    Raises:
        ConfigError: the record cannot be read.
    """
    path = run_dir / DATA_FILE
    try:
        digests: dict[str, str] = json.loads(path.read_text())
        return dict(digests)
    except (FileNotFoundError, NotADirectoryError):  # no run folder, or none can be made
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path}, which names the data of the run, cannot be read: {error}; restore it, or "
            "choose another run name"
        ) from error


def check_same_data(settings: Config, data: Mapping[str, str]) -> None:
    """Raise ConfigError if a run would continue on other data than it was made from.

    `data` has the digests of its data by name. Another test split is no obstacle: its evaluations
    are made anew.
    """
    before = recorded_data(settings.run_dir)
    changed = [
        f"{name} has content {digest[:12]} (was {before[name][:12]})"
        for name, digest in data.items()
        if name != "test" and before.get(name, digest) != digest
    ]
    if changed:
        raise ConfigError(
            f"run {settings.name} was made from different data than {settings.data.path} holds "
            f"now: {'; '.join(changed)}; restore those files, or choose another run name, to go on "
            "from what it has learned with model.path="
            f"{settings.run_dir / 'warm_start'} (or its policy)",
            code="config.other_data",
        )


def check_data_folder(data: DataConfig) -> None:
    """Raise ConfigError unless `data.path` is a folder."""
    if not data.path.is_dir():
        raise ConfigError(
            f"data.path = {data.path} is no folder, here or under {data_root()} (ORCHARD_DATA); "
            "set it to where the data is, or run orchard data fetch",
            code="config.no_data",
        )


def check_unchanged(settings: Config, phase: str) -> None:
    """Raise ConfigError if a run would continue under settings that compute something else."""
    path = settings.run_dir / "config.toml"
    if not path.is_file():
        return
    rl_starts = (
        phase == "train" and not (settings.run_dir / "checkpoints" / "learner-train").exists()
    )
    may_change = MAY_CHANGE + OF_RL if rl_starts else MAY_CHANGE
    changed = [
        line for line in differences(load(path), settings) if not line.startswith(may_change)
    ]
    if changed:
        raise ConfigError(
            f"run {settings.name} exists with another configuration: {'; '.join(changed)}; choose "
            "another name, to continue from its policy with model.path="
            f"{settings.run_dir / 'warm_start'} (or its policy)",
            code="config.changed",
        )


def check_widths(settings: Config, trie: Trie) -> None:
    """Refuse lists of widths for other levels; warn of beams wider than the catalog."""
    of_levels(settings.evaluate.beams, trie.depth, "evaluate.beams")
    beams = last(settings.evaluate.beams)
    width = max(settings.rollout.group_size, beams, settings.evaluate.valid_beams)
    if width > trie.num_leaves:
        logging.getLogger("orchard").warning(
            "a beam of %d is wider than the catalog of %d distinct sequences: "
            "each prompt gets %d candidates", width, trie.num_leaves, trie.num_leaves,
        )  # fmt: skip
