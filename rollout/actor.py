"""Worker of a rollout actor: an inference engine with its policy, which searches batches."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import ray
import torch
from ray.exceptions import ObjectLostError

from orchard.catalog.view import full_view
from orchard.errors import WeightMismatchError, WeightsLostError
from orchard.guide.guide import Guide
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.policy.store import Policy
from orchard.policy.transfer import (
    LOST,
    BaseMismatchError,
    WeightTransfer,
    check_digest,
    unpack,
)
from orchard.registry import import_plugins
from orchard.scorers.prefix_critic import PrefixCritic
from orchard.settings import RolloutConfig
from orchard.settings.widths import Width
from orchard.types import PolicyVersion, Prompts, SearchTrees, StoredTransfer
from rollout.candidates import Candidates
from rollout.engine.protocol import InferenceEngine, LoadsChanges, SearchFn
from rollout.engine.registry import ENGINES, EngineContext
from rollout.probe import LogprobProbe, verify
from rollout.search.batches import search_in_batches
from rollout.search.beam import beam
from rollout.search.guided import wider_unless_proved, without_history
from rollout.search.registry import PROVED, SearchContext, make_search
from rollout.search.think import generate_thoughts

_log = logging.getLogger(__name__)


class RolloutWorker:
    """Searcher with one engine; results depend only on its policy and the arguments."""

    def __init__(
        self,
        config: RolloutConfig,
        folder: Path,
        tokenizer: ItemTokenizer,
        seed: int,
        critic: PrefixCritic | None = None,
        guide: Guide | None = None,
        plugins: Sequence[str] = (),
    ) -> None:
        """Load the policy saved in `folder` as step 0; `load_weights` replaces it.

        A `critic` or a `guide` gives the values of guided searches, where the settings say so.
        `plugins` are modules that register searches and engines.

        Raises:
            ConfigError: a plugin cannot be imported.
            DataError: the folder contains no policy.
            CheckpointError: the weights do not have the digest that the folder names.
            EngineError: the engine cannot run on this machine.
        """
        import_plugins(plugins)
        self._config, self._tokenizer, self._critic = config, tokenizer, critic
        self._guide = guide
        torch.set_num_threads(config.threads)
        policy = Policy.open(folder, tokenizer)
        self._engine: InferenceEngine = ENGINES[config.engine](
            EngineContext(
                folder=folder,
                model=policy.model,
                tokenizer=tokenizer,
                version=replace(policy.version, step=0),
                config=config,
                seed=seed,
            )
        )
        self._verified = True
        """Whether the loaded weights passed their probe; False from loading until the check."""
        self._base: WeightTransfer | None = None
        """Base of adapter transfers, in the memory of the object store."""
        self._base_digest = ""
        self._loaded_base, self._changed = "", set[str]()
        """Digest of the base that is loaded, and names of the parameters that differ from it."""

    def load_weights(
        self,
        version: PolicyVersion,
        weights: WeightTransfer | StoredTransfer,
        probe: LogprobProbe | None = None,
    ) -> PolicyVersion:
        """Load weights, verify them with the probe, and return the engine's version.

        Args:
            version: version with the digest of the transfer.
            weights: transfer, or its place in the object store.
            probe: log-probabilities that the engine is to repeat.

        Raises:
            EngineError: the transfer has not the digest of the version, or its base is not there.
            WeightsLostError: the process that stored the weights has ended.
            CheckpointError: the weights belong to another model.
            WeightMismatchError: the probe's log-probabilities differ from the learner's. The worker
                then refuses to search until another `load_weights` succeeds.
        """
        base_ref: Any = None
        if isinstance(weights, StoredTransfer):
            base_ref, weights = weights.base_ref, _fetch(weights.ref)
        check_digest(weights, version.digest, threads=self._config.threads)
        if weights.base:
            self._take_base(weights.base, base_ref)
        values = unpack(weights, self._base)
        self._verified = False
        loaded, self._loaded_base = self._loaded_base, ""
        if weights.base and loaded == weights.base and isinstance(self._engine, LoadsChanges):
            changed = self._changed | weights.changed
            self._engine.load_changed_weights(version, values, changed)
        else:
            self._engine.load_weights(version, values)
        self._loaded_base, self._changed = weights.base, weights.changed
        if probe is not None:
            verify(self._engine, probe)
        self._verified = True
        return self._engine.version

    def _take_base(self, digest: str, base_ref: Any) -> None:
        """Hold the base with a digest, fetched unless it is the one at hand.

        Raises:
            BaseMismatchError: it has another digest, or there is no reference to it.
            WeightsLostError: the process that stored it has ended.
        """
        if self._base_digest == digest:
            return
        if self._base_digest:
            _log.warning(
                "adapters for base %s arrived where base %s is held; its full weights follow",
                digest[:8], self._base_digest[:8],
            )  # fmt: skip
        if base_ref is None:
            raise BaseMismatchError(
                f"adapters for base {digest[:8]} arrived where base {self._base_digest[:8] or '-'} "
                "is held; publish the full weights"
            )
        base: WeightTransfer = _fetch(base_ref)
        check_digest(base, digest, threads=self._config.threads)
        self._base, self._base_digest = base, digest

    def version(self) -> PolicyVersion:
        """Return the version of the loaded policy."""
        return self._engine.version

    def search(
        self,
        prompts: Prompts,
        seed: int,
        step: int | None = None,
        name: str | None = None,
        hint: int = 0,
    ) -> SearchTrees:
        """Search one tree per prompt.

        Args:
            prompts: prompts to search.
            seed: random seed of the training step.
            step: number of updates before the training step; None outside of training.
            name: search to run; by default the configured one.
            hint: number of first codes of its target that each prompt is given.

        Raises:
            WeightMismatchError: the loaded weights have not passed their probe.
            EngineError: a prompt does not fit, or the policy lacks what the search needs.
        """
        self._check_verified()
        ctx = SearchContext(
            config=self._config,
            engine=self._engine,
            tokenizer=self._tokenizer,
            seed=seed,
            step=step,
            critic=self._critic,
            guide=self._guide,
            hint=hint,
        )
        return make_search(name or self._config.search, ctx)(prompts)

    def rank(
        self,
        prompts: Prompts,
        beams: Width,
        thinking: bool = False,
        guide: Guide | None = None,
        exclude_seen: bool = False,
        wide: int = 0,
    ) -> Candidates:
        """Return the best leaves of each prompt by beam search.

        The configured search does not matter. With `thinking`, the beam search follows the
        policy's greedy thought.

        Args:
            prompts: prompts to search.
            beams: width of the beam: one number, or one for each level.
            thinking: whether the policy thinks first.
            guide: guide that ranks prefixes and candidates.
            exclude_seen: whether to leave out the leaves of each prompt's history.
            wide: width of a second search where the first ten candidates are not proved; 0 for
                none. Only with a guide.

        Raises:
            WeightMismatchError, EngineError: as `search`.
        """
        self._check_verified()
        search_fn: SearchFn = partial(beam, width=beams)
        if guide is not None:
            search_fn = partial(beam, width=beams, guide=guide, prove=PROVED)
        if guide is not None and wide:
            search_fn = partial(
                wider_unless_proved, width=beams, wide=wide, prove=PROVED, guide=guide
            )
        if exclude_seen:
            view = full_view(self._tokenizer.catalog.trie)
            search_fn = partial(without_history, search_fn=search_fn, view=view)
        size = self._config.batch_size
        if not thinking:
            return search_in_batches(self._engine, search_fn, prompts, size=size)
        began = perf_counter()
        thoughts = generate_thoughts(
            self._engine, self._tokenizer, self._config, prompts, count=1, temperature=0.0, seed=0
        )
        contexts = thoughts.contexts(prompts)
        candidates = search_in_batches(self._engine, search_fn, contexts, size=size)
        cost = thoughts.cost + candidates.cost
        return replace(candidates, cost=replace(cost, seconds=perf_counter() - began))

    def _check_verified(self) -> None:
        """Raise WeightMismatchError if the loaded weights have not passed their probe."""
        if not self._verified:
            raise WeightMismatchError(
                f"policy {self._engine.version} failed its probe here; load a version first"
            )


def _fetch(ref: Any) -> WeightTransfer:
    """Return a stored transfer; raise WeightsLostError if its owner has ended."""
    if isinstance(ref, WeightTransfer):  # of this process
        return ref
    try:
        return ray.get(ref)
    except ObjectLostError as error:
        raise WeightsLostError(LOST) from error
