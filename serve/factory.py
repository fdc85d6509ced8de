"""From a policy folder and the settings to a service that can start."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from orchard.catalog import catalog as catalogues
from orchard.catalog.catalog import Catalogue
from orchard.errors import ConfigError, EngineError
from orchard.parquet import read_table
from orchard.policy import item_tokenizer
from orchard.policy import model as models
from orchard.policy.item_tokenizer import Vocabulary
from orchard.settings import RolloutConfig, ServeConfig
from rollout.engine.protocol import Holder
from rollout.engine.torch import TorchEngine
from rollout.engine.vllm import VllmHolder
from serve.catalog.attributes import NOTHING, check_filters, read_attributes
from serve.catalog.store import Stock
from serve.exposure_log import ExposureLog
from serve.metrics import Meters
from serve.policies import slot
from serve.policies.ab_test import MAIN
from serve.policies.slot import Loaded, Seat
from serve.service import Service
from serve.shared_state import Ledger
from serve.user_history import open_histories

_log = logging.getLogger("orchard.serve")


def open_service(
    folder: Path, config: ServeConfig, meters: Meters, *, max_history: int | None = None
) -> Service:
    """A service for the policy in `folder`; reads and checks everything that the settings name.

    Args:
        folder: of an exported policy; its catalogue is what is served.
        config: the settings.
        meters: where figures go.
        max_history: items that the policy reads; by default what it was exported with.

    Raises:
        DataError, ConfigError, CheckpointError, EngineError: one sentence each.
    """
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(config.threads)
    models.check_folder(folder)
    items = catalogues.load(folder / "catalogue")
    words = item_tokenizer.of_codes(item_tokenizer.read_tokenizer(folder), items)
    attributes = NOTHING
    if config.attributes is not None:
        attributes = read_attributes(config.attributes, config.filters)
    check_filters(attributes, config.filters)
    popularity = read_popularity(config.popularity) if config.popularity is not None else {}
    ledger = Ledger(config.state or folder.parent / "serve", items.digest)
    stock = Stock(
        items, words, attributes=attributes, filters=config.filters, popularity=popularity,
        keep=config.versions,
    )  # fmt: skip
    seats = {MAIN: _seat(MAIN, folder, config, items, words, ledger)}
    known = slot.read_facts(folder)
    for name in sorted(config.variants):
        one = config.variants[name]
        seats[name] = _seat(
            name, one.policy, config, items, words, ledger, share=one.share, shadow=one.shadow
        )
        _check_prompts(name, one.policy, words, items, known)
    return Service(
        config, seats, stock, ledger, meters,
        max_history=max_history or (known["max_history"] if known else 10),
        histories=open_histories(config),
        exposure=ExposureLog(config.exposure) if config.exposure is not None else None,
    )  # fmt: skip


def _check_prompts(
    name: str, folder: Path, words: Vocabulary, items: Catalogue, main: dict[str, Any] | None
) -> None:
    """All variants read one prompt, that of the main policy."""
    own = item_tokenizer.of_codes(item_tokenizer.read_tokenizer(folder), items)
    facts = slot.read_facts(folder)
    same = (own.size, own.bos, own.pad, own.tags, own.instruction) == (
        words.size, words.bos, words.pad, words.tags, words.instruction,
    ) and all(map(torch.equal, own.level_tokens, words.level_tokens))  # fmt: skip
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


def _seat(
    name: str,
    folder: Path,
    config: ServeConfig,
    items: Catalogue,
    words: Vocabulary,
    ledger: Ledger,
    *,
    share: float = 0.0,
    shadow: bool = False,
) -> Seat:
    first = slot.read_policy(folder, words, items.digest)

    def make(loaded: Loaded) -> Holder:
        return engine_of(folder, loaded, items, words, config)

    return Seat(
        name, folder, first, words, items, make,
        keep=ledger.policies, versions=config.versions, tolerance=config.probe_tolerance,
        share=share, shadow=shadow,
    )  # fmt: skip


def engine_of(
    folder: Path, loaded: Loaded, items: Catalogue, words: Vocabulary, config: ServeConfig
) -> Holder:
    """The configured engine; torch, with a warning, where vLLM cannot be had."""
    if config.engine == "vllm":
        rollout = RolloutConfig(engine="vllm", threads=config.threads)
        try:
            return VllmHolder(
                folder, loaded.model, items.trie, words, loaded.version, rollout, seed=0
            )
        except EngineError as error:
            _log.warning("serving with the torch engine: %s", error)
    return TorchEngine(loaded.model, items.trie, words, loaded.version)


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
