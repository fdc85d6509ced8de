"""Create the folder of a run, and read and write the policies in it."""

import json
import logging
from dataclasses import replace
from pathlib import Path

from cluster.training import text_policy
from cluster.training.checks import DATA_FILE, recorded_data
from cluster.training.run import Run
from orchard import config
from orchard.errors import ConfigError
from orchard.folders import atomic_write
from orchard.policy import lora, model, value_head
from orchard.policy.store import Policy, PolicyFacts, has_guide, read_adapter
from orchard.policy.weights import Weights, digest, restore, views
from orchard.semantic_ids.bundle import BUNDLE
from orchard.settings import Config
from orchard.types import PolicyVersion

_log = logging.getLogger("orchard")


def open_run_dir(run: Run) -> None:
    """Create the run folder with the resolved configuration and, for a new policy, its weights."""
    try:
        run.dir.mkdir(parents=True, exist_ok=True)
        if run.phase != "evaluate":
            atomic_write(run.dir / "config.toml", config.dump(run.config))
            data = recorded_data(run.dir) | run.data
            atomic_write(run.dir / DATA_FILE, json.dumps(data, indent=2) + "\n")
            if run.bundle is not None:
                # Policies are saved from this copy, whatever becomes of the data meanwhile.
                run.bundle.copy(run.dir / BUNDLE)
    except OSError as error:
        raise ConfigError(
            f"run folder {run.dir} cannot be written: {error.strerror}; "
            "set output to writable storage with free space"
        ) from error
    if run.policy == run.dir / "scratch" and not run.policy.is_dir():
        if run.growth is not None:
            _log.warning("%s", run.growth)
        if run.base is not None:
            initial = text_policy.load_resized(
                run.base, run.tokenizer, run.growth, seed=run.config.seed
            )
        else:
            initial = model.create(run.config.model, run.tokenizer, seed=run.config.seed)
        _as_policy(run, initial, PolicyVersion(step=0, digest=""), {}).save(run.policy)


def base_of(settings: Config) -> Path:
    """Return the folder of the model that the run's first phase starts from."""
    return settings.model.path or settings.run_dir / "scratch"


def save_policy(
    run: Run,
    folder: Path,
    version: PolicyVersion,
    weights: Weights,
    adapter: Weights | None = None,
    **measurements: float,
) -> None:
    """Write a version of the run's policy as a policy folder.

    A guide of the folder is kept; without one, that of the policy that the run started from is
    carried along.

    Args:
        run: run that trained it.
        folder: folder to write.
        version: version of the weights; the folder names them by their SHA-256.
        weights: weights, with merged adapters.
        adapter: LoRA factors of what the phase has added to the policy that it started from.
        measurements: facts about the version.
    """
    trained = model.load(run.policy, run.tokenizer)
    value_head.adapt_weights(trained, weights)
    restore(trained, weights)
    version = replace(version, digest=digest(views(trained)))
    source = folder if has_guide(folder) else run.policy
    policy = _as_policy(run, trained, version, measurements, source)
    replace(policy, adapter=_since_base(run, adapter or {})).save(folder)


def saved_policy(run: Run, folder: Path) -> tuple[PolicyVersion, Weights]:
    """Return version and weights of a policy folder of the run's catalog."""
    policy = Policy.open(folder, run.tokenizer)
    return policy.version, policy.weights


def _since_base(run: Run, adapter: Weights) -> Weights:
    """Return the factors of all that was added to the base; empty where more than that was."""
    if not adapter or run.policy in (base_of(run.config), run.dir / "scratch"):
        return adapter
    before = read_adapter(run.policy)
    return lora.stack(before, adapter) if before.keys() == adapter.keys() else {}


def _as_policy(
    run: Run,
    trained: model.PreTrainedModel,
    version: PolicyVersion,
    measurements: dict[str, float],
    source: Path | None = None,
) -> Policy:
    return Policy(
        version=version,
        model=trained,
        tokenizer=run.tokenizer,
        text_tokenizer=run.text_tokenizer,
        facts=PolicyFacts(
            max_history=run.config.data.max_history,
            measurements=measurements,
            data={name: digest for name, digest in run.data.items() if name != "test"},
        ),
        folder=source,
        new_bundle=run.bundle and replace(run.bundle, folder=run.dir / BUNDLE),
    )
