"""Ray actor for rollouts: an inference engine with its policy, searched for batches of prompts."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import ray
import torch

from orchard.catalog.view import full_view
from orchard.errors import WeightMismatchError
from orchard.guide.guide import Guide
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.policy.store import Policy
from orchard.policy.weights import Weights
from orchard.registry import import_plugins
from orchard.scorers.prefix_critic import PrefixCritic
from orchard.settings import RolloutConfig
from orchard.types import PolicyVersion, Prompts, SearchTrees
from rollout.candidates import Candidates
from rollout.engine.protocol import InferenceEngine, SearchFn
from rollout.engine.registry import ENGINES, EngineContext
from rollout.probe import LogprobProbe, verify
from rollout.search.batches import search_in_batches
from rollout.search.beam import beam
from rollout.search.guided import wider_unless_proved, without_history
from rollout.search.registry import PROVED, SearchContext, make_search
from rollout.search.think import generate_thoughts


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

    def load_weights(
        self, version: PolicyVersion, weights: Weights, probe: LogprobProbe | None = None
    ) -> PolicyVersion:
        """Load weights, verify them with the probe, and return the engine's version.

        Raises:
            EngineError: the weights are not those of the version.
            WeightMismatchError: the probe's log-probabilities differ from the learner's. The worker
                then refuses to search until another `load_weights` succeeds.
        """
        self._engine.load_weights(version, weights)
        self._verified = False
        if probe is not None:
            verify(self._engine, probe)
        self._verified = True
        return self._engine.version

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
        beams: int,
        thinking: bool = False,
        guide: Guide | None = None,
        exclude_seen: bool = False,
        wide: int = 0,
    ) -> Candidates:
        """Return the best `beams` leaves of each prompt by beam search.

        The configured search does not matter. With `thinking`, the beam search follows the
        policy's greedy thought.

        Args:
            prompts: prompts to search.
            beams: width of the beam.
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


RolloutActor: Any = ray.remote(RolloutWorker)
