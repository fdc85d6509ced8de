"""Service factory: build a service from a policy folder and the settings."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from orchard.catalog import catalog as catalogs
from orchard.catalog.catalog import Catalog
from orchard.errors import CheckpointError, ConfigError, EngineError, OrchardError
from orchard.parquet import read_table
from orchard.policy import model as models
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.policy.store import CATALOG, PolicyFacts, open_bundle, open_tokenizer
from orchard.settings import RolloutConfig, ServeConfig
from orchard.settings.widths import of_levels
from rollout.engine.protocol import InferenceEngine
from rollout.engine.registry import ENGINES, EngineContext
from serve.catalog.attributes import NOTHING, check_filters, read_attributes
from serve.catalog.new_items import Assigner
from serve.catalog.store import CatalogStore
from serve.exposure_log import ExposureLog
from serve.metrics import ServeMetrics
from serve.policies import read
from serve.policies.ab_test import MAIN
from serve.policies.read import UNREADABLE, LoadedPolicy
from serve.policies.slot import PolicySlot
from serve.service import Service
from serve.shared_state import SharedState
from serve.user_history import open_histories

_log = logging.getLogger("orchard.serve")

_FALLBACK = "torch"
"""Engine that serves where the configured one cannot run."""


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
    state = config.state or folder.parent / "serve"
    main = _open_main(folder, state, config.guide)
    tokenizer, facts = main.tokenizer, main.facts
    of_levels(config.width, tokenizer.trie.depth, "serve.width")
    attributes = NOTHING
    if config.attributes is not None:
        attributes = read_attributes(config.attributes, config.filters)
    check_filters(attributes, config.filters)
    popularity = read_popularity(config.popularity) if config.popularity is not None else {}
    shared_state = SharedState(state, tokenizer.catalog.digest)
    shared_state.keep_catalog(tokenizer.catalog, main.assigner.bundle)
    catalog_store = CatalogStore(
        tokenizer, attributes=attributes, filters=config.filters, popularity=popularity,
        keep=config.versions, assigner=main.assigner,
    )  # fmt: skip
    shared_state.catch_up(catalog_store)
    slots = {
        MAIN: _slot(
            MAIN, folder, config, tokenizer, shared_state, main.first, main.refused,
            with_guide=config.guide,
        )
    }  # fmt: skip
    for name in sorted(config.variants):
        variant = config.variants[name]
        with_guide = config.guide if variant.guide is None else variant.guide
        slots[name] = _slot(
            name, variant.policy, config, tokenizer, shared_state,
            *_open_variant(variant.policy, tokenizer, shared_state.policies / name, with_guide),
            with_guide=with_guide, share=variant.share, shadow=variant.shadow,
        )  # fmt: skip
        _check_prompts(name, variant.policy, tokenizer, facts)
    return Service(
        config, slots, catalog_store, shared_state, metrics,
        max_history=max_history or facts.max_history or 10,
        histories=open_histories(config),
        exposure=ExposureLog(config.exposure) if config.exposure is not None else None,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _MainPolicy:
    """State that the endpoint starts with."""

    tokenizer: ItemTokenizer
    facts: PolicyFacts
    first: LoadedPolicy
    refused: str
    """Reason why it is an archived policy, empty if it is the one in the folder."""
    assigner: Assigner
    """Assigner of semantic IDs to new items."""


def _open_main(folder: Path, state: Path, with_guide: bool) -> _MainPolicy:
    """Read the main policy; if its folder is unreadable, the newest whole copy in `state`.

    Raises:
        DataError, CheckpointError: the folder cannot be read, and there is no whole copy.
    """
    try:
        models.check_folder(folder)
        tokenizer = open_tokenizer(folder)
        first = read.read_policy(folder, tokenizer, with_guide=with_guide)
        return _MainPolicy(
            tokenizer=tokenizer, facts=PolicyFacts.read(folder), first=first, refused="",
            assigner=_open_assigner(folder, tokenizer.catalog),
        )  # fmt: skip
    except UNREADABLE as error:
        for copy in copies_of(state):
            try:
                catalog = catalogs.load(copy.parents[2] / CATALOG)
                tokenizer = open_tokenizer(copy, catalog)
                first = read.read_copy(copy, tokenizer, with_guide=with_guide)
                facts = PolicyFacts.read(copy)
            except UNREADABLE:
                continue
            _log.error("serving policy %s of %s instead: %s", first.version, copy, error)
            return _MainPolicy(
                tokenizer=tokenizer, facts=facts, first=first, refused=read.sentence(error),
                assigner=_open_assigner(copy.parents[2], catalog),
            )  # fmt: skip
        raise


def _open_assigner(folder: Path, catalog: Catalog) -> Assigner:
    """Read the tokenizer bundle in a folder; one that cannot be used is logged, and left out."""
    try:
        return Assigner(bundle=open_bundle(folder, catalog))
    except (OSError, OrchardError) as error:
        _log.error("new items need a sid, as the tokenizer bundle is not used: %s", error)
        why = "it cannot be read" if isinstance(error, OSError) else read.without_paths(error)
        return Assigner(bundle=None, refused=f"the tokenizer bundle is not used: {why}")


def _open_variant(
    folder: Path, tokenizer: ItemTokenizer, archive: Path, with_guide: bool
) -> tuple[LoadedPolicy, str]:
    """Read the policy of a variant, or its newest whole copy and why the folder is refused."""
    try:
        return read.read_policy(folder, tokenizer, with_guide=with_guide), ""
    except UNREADABLE as error:
        try:
            PolicyFacts.read(folder).check_catalog(tokenizer.catalog, folder)
        except CheckpointError as other:
            if not archive.is_dir():
                raise other from error
        for copy in reversed(read.archived_policies(archive)):
            try:
                first = read.read_copy(copy, tokenizer, with_guide=with_guide)
            except UNREADABLE:
                continue
            _log.error("serving policy %s of %s instead: %s", first.version, copy, error)
            return first, read.sentence(error)
        raise


def copies_of(state: Path) -> list[Path]:
    """Return the archived main policies below a state folder, the newest copy first."""
    copies = [
        copy
        for archive in state.glob(f"*/policies/{MAIN}")
        for copy in read.archived_policies(archive)
    ]
    return sorted(copies, key=lambda copy: copy.stat().st_mtime_ns, reverse=True)


def _check_prompts(
    name: str, folder: Path, tokenizer: ItemTokenizer, main_facts: PolicyFacts
) -> None:
    """Raise ConfigError unless a variant reads the same prompts as the main policy."""
    other, facts = open_tokenizer(folder, tokenizer.catalog), PolicyFacts.read(folder)
    is_same = (
        other.size, other.bos, other.pad, other.think, other.instruction, other.context,
    ) == (
        tokenizer.size, tokenizer.bos, tokenizer.pad, tokenizer.think, tokenizer.instruction,
        tokenizer.context,
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
    first: LoadedPolicy,
    refused: str,
    *,
    with_guide: bool,
    share: float = 0.0,
    shadow: bool = False,
) -> PolicySlot:
    """Build the slot of a variant around its first policy."""

    def make(loaded: LoadedPolicy) -> InferenceEngine:
        return engine_of(loaded, tokenizer, config)

    return PolicySlot(
        name, folder, first, tokenizer, make,
        keep=shared_state.policies, versions=config.versions, tolerance=config.probe_tolerance,
        with_guide=with_guide, share=share, shadow=shadow, spared=shared_state.pinned(name),
        refused=refused,
    )  # fmt: skip


def engine_of(
    loaded: LoadedPolicy, tokenizer: ItemTokenizer, config: ServeConfig
) -> InferenceEngine:
    """Create the configured engine; fall back to torch, with a warning, if it is unavailable."""
    ENGINES.check_name(config.engine, "serve.engine")
    ctx = EngineContext(
        folder=loaded.source,
        model=loaded.model,
        tokenizer=tokenizer,
        version=loaded.version,
        config=RolloutConfig(engine=config.engine, threads=config.threads),
        seed=0,
        prefix_bytes=int(config.prefix_cache_mib * 2**20),
    )
    if config.engine != _FALLBACK:
        try:
            engine = ENGINES[config.engine](ctx)
            # The engine has read the files itself, which may have changed since they were verified.
            engine.load_weights(loaded.version, loaded.weights)
            return engine
        except EngineError as error:
            _log.warning("serving with the %s engine: %s", _FALLBACK, error)
    return ENGINES[_FALLBACK](ctx)


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
