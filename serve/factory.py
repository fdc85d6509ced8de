"""Service factory: build a service from a policy folder and the settings."""

import logging
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from orchard.errors import ConfigError, EngineError
from orchard.parquet import read_table
from orchard.policy import model as models
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.policy.store import PolicyFacts, open_tokenizer
from orchard.settings import RolloutConfig, ServeConfig
from rollout.engine.protocol import InferenceEngine
from rollout.engine.torch import TorchEngine
from rollout.engine.vllm import VllmEngine
from serve.catalog.attributes import NOTHING, check_filters, read_attributes
from serve.catalog.store import CatalogStore
from serve.exposure_log import ExposureLog
from serve.metrics import ServeMetrics
from serve.policies import slot
from serve.policies.ab_test import MAIN
from serve.policies.slot import LoadedPolicy, PolicySlot
from serve.service import Service
from serve.shared_state import SharedState
from serve.user_history import open_histories

_log = logging.getLogger("orchard.serve")


def open_service(
    folder: Path, config: ServeConfig, metrics: ServeMetrics, *, max_history: int | None = None
) -> Service:
    """Build a service for the policy in `folder`; load and check all files in the settings.

    Args:
        folder: folder of an exported policy, whose catalog is served.
        config: serving settings.
        metrics: destination of the metrics.
        max_history: number of history items that the policy reads; by default as exported.

    Raises:
        DataError, ConfigError, CheckpointError, EngineError: each with a one-sentence message.
    """
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(config.threads)
    models.check_folder(folder)
    tokenizer = open_tokenizer(folder)
    attributes = NOTHING
    if config.attributes is not None:
        attributes = read_attributes(config.attributes, config.filters)
    check_filters(attributes, config.filters)
    popularity = read_popularity(config.popularity) if config.popularity is not None else {}
    shared_state = SharedState(config.state or folder.parent / "serve", tokenizer.catalog.digest)
    catalog_store = CatalogStore(
        tokenizer, attributes=attributes, filters=config.filters, popularity=popularity,
        keep=config.versions,
    )  # fmt: skip
    slots = {MAIN: _slot(MAIN, folder, config, tokenizer, shared_state)}
    facts = PolicyFacts.read(folder)
    for name in sorted(config.variants):
        variant = config.variants[name]
        slots[name] = _slot(
            name, variant.policy, config, tokenizer, shared_state,
            share=variant.share, shadow=variant.shadow,
        )  # fmt: skip
        _check_prompts(name, variant.policy, tokenizer, facts)
    return Service(
        config, slots, catalog_store, shared_state, metrics,
        max_history=max_history or facts.max_history or 10,
        histories=open_histories(config),
        exposure=ExposureLog(config.exposure) if config.exposure is not None else None,
    )  # fmt: skip


def _check_prompts(
    name: str, folder: Path, tokenizer: ItemTokenizer, main_facts: PolicyFacts
) -> None:
    """Raise ConfigError unless a variant reads the same prompts as the main policy."""
    other, facts = open_tokenizer(folder, tokenizer.catalog), PolicyFacts.read(folder)
    is_same = (other.size, other.bos, other.pad, other.think, other.instruction) == (
        tokenizer.size, tokenizer.bos, tokenizer.pad, tokenizer.think, tokenizer.instruction,
    ) and all(map(torch.equal, other.level_tokens, tokenizer.level_tokens))  # fmt: skip
    if not is_same:
        raise ConfigError(
            f"serve.variants.{name}: the tokens of {folder} are not those of the main policy; "
            "serve it from another endpoint"
        )
    lengths = {facts.max_history, main_facts.max_history} - {None}
    if len(lengths) > 1:
        raise ConfigError(
            f"serve.variants.{name} was trained with data.max_history = {facts.max_history}, "
            f"the main policy with {main_facts.max_history}; serve it from another endpoint"
        )


def _slot(
    name: str,
    folder: Path,
    config: ServeConfig,
    tokenizer: ItemTokenizer,
    shared_state: SharedState,
    *,
    share: float = 0.0,
    shadow: bool = False,
) -> PolicySlot:
    """Build the slot of a variant with the policy that is in its folder now."""
    first = slot.read_policy(folder, tokenizer)

    def make(loaded: LoadedPolicy) -> InferenceEngine:
        return engine_of(folder, loaded, tokenizer, config)

    return PolicySlot(
        name, folder, first, tokenizer, make,
        keep=shared_state.policies, versions=config.versions, tolerance=config.probe_tolerance,
        share=share, shadow=shadow,
    )  # fmt: skip


def engine_of(
    folder: Path, loaded: LoadedPolicy, tokenizer: ItemTokenizer, config: ServeConfig
) -> InferenceEngine:
    """Create the configured engine; fall back to torch, with a warning, if vLLM is unavailable."""
    if config.engine == "vllm":
        rollout = RolloutConfig(engine="vllm", threads=config.threads)
        try:
            return VllmEngine(folder, loaded.model, tokenizer, loaded.version, rollout, seed=0)
        except EngineError as error:
            _log.warning("serving with the torch engine: %s", error)
    return TorchEngine(loaded.model, tokenizer, loaded.version)


def read_popularity(path: Path) -> dict[int, float]:
    """Read the interaction count of each item.

    Raises:
        DataError: the file or a column is missing, or unreadable.
    """
    table = read_table(
        path, role="popularity", columns=("item_id", "count"), remedy="serve.popularity"
    )
    counts = [float(count or 0) for count in table["count"].to_pylist()]
    return dict(zip(table["item_id"].to_pylist(), counts, strict=True))
