"""Ray actor for rollouts: an inference engine with its policy, searched for batches of prompts."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import ray
import torch

from orchard.catalog.view import full_view
from orchard.errors import EngineError, WeightMismatchError
from orchard.guide.guide import Guide
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.policy.store import Policy
from orchard.policy.weights import Weights
from orchard.registry import import_plugins
from orchard.scorers.prefix_critic import PrefixCritic
from orchard.settings import RolloutConfig
from orchard.types import PolicyVersion, Prompts, SearchTrees
from rollout.candidates import Candidates
from rollout.engine.protocol import InferenceEngine
from rollout.engine.registry import ENGINES, EngineContext
from rollout.probe import LogprobProbe, verify
from rollout.search.beam import beam
from rollout.search.guided import wider_unless_proved, without_history
from rollout.search.registry import PROVED, SEARCHES, SearchContext, SearchFn, make_search
from rollout.search.think import think
from rollout.search.thoughts import Thoughts, attach_thoughts
from rollout.search_trees import build_search_trees


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

    def search(self, prompts: Prompts, seed: int, kind: str | None = None) -> SearchTrees:
        """Search one tree per prompt, with the configured search or the one named by `kind`."""
        name = kind or self._config.search
        ctx = SearchContext(
            config=self._config,
            catalog=self._tokenizer.catalog,
            seed=seed,
            critic=self._critic,
            guide=self._guide,
        )
        search_fn = make_search(name, ctx)
        if SEARCHES.facts(name).thinks:
            return self._think_and_search(prompts, search_fn, seed)
        candidates = self._in_batches(prompts, search_fn)
        return build_search_trees(prompts, candidates, self._tokenizer, self._engine.version)

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
        """
        search_fn: SearchFn = partial(beam, width=beams)
        if guide is not None:
            search_fn = partial(beam, width=beams, guide=guide, prove=PROVED)
        if guide is not None and wide:
            search_fn = partial(
                wider_unless_proved, width=beams, wide=wide, prove=PROVED, guide=guide
            )
        if exclude_seen:
            view = full_view(self._tokenizer.catalog.trie)
            search_fn = partial(without_history, find=search_fn, view=view)
        if not thinking:
            return self._in_batches(prompts, search_fn)
        began = perf_counter()
        thoughts = self._thoughts(prompts, count=1, temperature=0.0, seed=0)
        candidates = self._in_batches(thoughts.contexts(prompts), search_fn)
        cost = thoughts.cost + candidates.cost
        return replace(candidates, cost=replace(cost, seconds=perf_counter() - began))

    def _think_and_search(self, prompts: Prompts, search_fn: SearchFn, seed: int) -> SearchTrees:
        """Generate thoughts, then search codes after each of them by `search_fn`."""
        began, config = perf_counter(), self._config
        thoughts = self._thoughts(
            prompts, count=config.group_size, temperature=config.temperature, seed=seed
        )
        contexts, version = thoughts.contexts(prompts), self._engine.version
        candidates = self._in_batches(contexts, search_fn)
        codes = build_search_trees(contexts, candidates, self._tokenizer, version)
        trees = attach_thoughts(prompts, thoughts, codes, self._tokenizer.catalog.trie.depth)
        return replace(trees, cost=replace(trees.cost, seconds=perf_counter() - began))

    def _thoughts(self, prompts: Prompts, *, count: int, temperature: float, seed: int) -> Thoughts:
        """Generate `count` thoughts per prompt; raise EngineError without thinking tags."""
        if (tags := self._tokenizer.think) is None:
            raise EngineError(
                "the policy has no tags to think between; warm-start it on rationales "
                "(data.rationales), or choose a search without thoughts"
            )
        return think(
            self._engine.generate,
            prompts,
            tags,
            count=count,
            blocks=self._tokenizer.catalog.trie.depth,
            cap=self._config.think.block_tokens,
            temperature=temperature,
            seed=seed,
        )

    def _in_batches(self, prompts: Prompts, search_fn: SearchFn) -> Candidates:
        """Run `search_fn` in batches of `rollout.batch_size`; candidates in order of the prompts.

        Raises:
            WeightMismatchError: the loaded weights have not passed their probe.
        """
        if not self._verified:
            raise WeightMismatchError(
                f"policy {self._engine.version} failed its probe here; load a version first"
            )
        began = perf_counter()
        # Batches of prompts of similar length, to limit padding.
        order = np.argsort(np.diff(prompts.token_start), kind="stable")
        size = self._config.batch_size
        batches = [order[first : first + size] for first in range(0, len(order), size)]
        candidates = Candidates.concatenate(
            [self._engine.run(search_fn, prompts.select(rows)) for rows in batches]
        )
        cost = replace(candidates.cost, seconds=perf_counter() - began)
        # argsort(order) inverts the permutation.
        return replace(candidates.select(np.argsort(order)), cost=cost)


RolloutActor: Any = ray.remote(RolloutWorker)
