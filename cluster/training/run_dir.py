"""Create the folder of a run, and read and write the policies in it."""

import json
from pathlib import Path

from cluster.training import text_policy
from cluster.training.run import Run
from orchard import config
from orchard.catalog import catalog
from orchard.errors import ConfigError
from orchard.folders import atomic_dir, atomic_write
from orchard.policy import model, value_head
from orchard.policy.store import FILE, exported_step
from orchard.policy.weights import Weights, digest, restore, snapshot
from orchard.types import PolicyVersion


def open_run_dir(run: Run) -> None:
    """Create the run folder with the resolved configuration and, for a new policy, its weights."""
    try:
        run.dir.mkdir(parents=True, exist_ok=True)
        if run.phase != "evaluate":
            atomic_write(run.dir / "config.toml", config.dump(run.config))
    except OSError as error:
        raise ConfigError(
            f"run folder {run.dir} cannot be written: {error.strerror}; "
            "set output to storage that takes writes and has room"
        ) from error
    if run.policy == run.dir / "scratch" and not run.policy.is_dir():
        if run.base is not None:
            initial = text_policy.load_resized(run.base, run.tokenizer, seed=run.config.seed)
        else:
            initial = model.create(run.config.model, run.tokenizer, seed=run.config.seed)
        _save(run, run.policy, initial, PolicyVersion(step=0, digest=""), {})


def save_policy(
    run: Run, folder: Path, policy: PolicyVersion, weights: Weights, **facts: float
) -> None:
    """Write a policy as a Hugging Face folder with its tokenizer, catalog and facts."""
    trained = model.load(run.policy, run.tokenizer)
    value_head.adapt_weights(trained, weights)
    restore(trained, weights)
    _save(run, folder, trained, policy, facts)


def saved_policy(run: Run, folder: Path) -> tuple[PolicyVersion, Weights]:
    """Load the version and the weights of a policy folder."""
    loaded = snapshot(model.load(folder, run.tokenizer))
    return PolicyVersion(step=exported_step(folder), digest=digest(loaded)), loaded


def _save(
    run: Run,
    folder: Path,
    trained: model.PreTrainedModel,
    policy: PolicyVersion,
    facts: dict[str, float],
) -> None:
    """Write a policy folder atomically, so that a reader never sees a partial policy."""
    metadata = {
        "version": {"step": policy.step, "digest": policy.digest},
        "catalogue": run.catalog.digest,
        "max_history": run.config.data.max_history,
        "facts": facts,
    }
    with atomic_dir(folder) as partial:
        value_head.save(trained, partial)
        run.text_tokenizer.save_pretrained(partial)
        catalog.write(run.catalog, partial / "catalogue")
        atomic_write(partial / FILE, json.dumps(metadata, indent=2) + "\n")
