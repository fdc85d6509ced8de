"""From a policy folder and the settings to a service that can start."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from orchard.catalog import catalog as catalogs
from orchard.errors import ConfigError, EngineError
from orchard.parquet import read_table
from orchard.policy import item_tokenizer
from orchard.policy import model as models
from orchard.policy.item_tokenizer import ItemTokenizer
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
    folder: Path, config: ServeConfig, meters: ServeMetrics, *, max_history: int | None = None
) -> Service:
    """A service for the policy in `folder`; reads and checks everything that the settings name.

    Args:
        folder: of an exported policy; its catalog is what is served.
        config: the settings.
        meters: where figures go.
        max_history: items that the policy reads; by default what it was exported with.

    Raises:
        DataError, ConfigError, CheckpointError, EngineError: one sentence each.
    """
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(config.threads)
    models.check_folder(folder)
    items = catalogs.load(folder / "catalogue")
    words = item_tokenizer.make_item_tokenizer(item_tokenizer.read_tokenizer(folder), items)
    attributes = NOTHING
    if config.attributes is not None:
        attributes = read_attributes(config.attributes, config.filters)
    check_filters(attributes, config.filters)
    popularity = read_popularity(config.popularity) if config.popularity is not None else {}
    shared_state = SharedState(config.state or folder.parent / "serve", items.digest)
    catalog_store = CatalogStore(
        words, attributes=attributes, filters=config.filters, popularity=popularity,
        keep=config.versions,
    )  # fmt: skip
    slots = {MAIN: _slot(MAIN, folder, config, words, shared_state)}
    known = slot.read_facts(folder)
    for name in sorted(config.variants):
        one = config.variants[name]
        slots[name] = _slot(
            name, one.policy, config, words, shared_state, share=one.share, shadow=one.shadow
        )
        _check_prompts(name, one.policy, words, known)
    return Service(
        config, slots, catalog_store, shared_state, meters,
        max_history=max_history or (known["max_history"] if known else 10),
        histories=open_histories(config),
        exposure=ExposureLog(config.exposure) if config.exposure is not None else None,
    )  # fmt: skip


def _check_prompts(
    name: str, folder: Path, tokenizer: ItemTokenizer, main: dict[str, Any] | None
) -> None:
    """All variants read one prompt, that of the main policy."""
    own = item_tokenizer.make_item_tokenizer(
        item_tokenizer.read_tokenizer(folder), tokenizer.catalog
    )
    facts = slot.read_facts(folder)
    same = (own.size, own.bos, own.pad, own.think, own.instruction) == (
        tokenizer.size, tokenizer.bos, tokenizer.pad, tokenizer.think, tokenizer.instruction,
    ) and all(map(torch.equal, own.level_tokens, tokenizer.level_tokens))  # fmt: skip
    if not same:
        raise ConfigError(
            f"serve.variants.{name}: the tokens of {folder} are not those of the main policy; "
            "serve it from an endpoint of its own"
        )
    if main is not None and facts is not None and facts["max_history"] != main["max_history"]:
        raise ConfigError(
            f"serve.variants.{name} was trained with data.max_history = {facts['max_history']}, "
            f"the main policy with {main['max_history']}; serve it from an endpoint of its own"
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
    """The configured engine; torch, with a warning, where vLLM cannot be had."""
    if config.engine == "vllm":
        rollout = RolloutConfig(engine="vllm", threads=config.threads)
        try:
            return VllmEngine(folder, loaded.model, tokenizer, loaded.version, rollout, seed=0)
        except EngineError as error:
            _log.warning("serving with the torch engine: %s", error)
    return TorchEngine(loaded.model, tokenizer, loaded.version)


def read_popularity(path: Path) -> dict[int, float]:
    """Item to count.

    Raises:
        DataError: the file or a column is missing, or unreadable.
    """
    table = read_table(
        path, role="popularity", columns=("item_id", "count"), remedy="serve.popularity"
    )
    counts = [float(count or 0) for count in table["count"].to_pylist()]
    return dict(zip(table["item_id"].to_pylist(), counts, strict=True))
