"""The Ray shell of the room: holds an engine and its policy, and searches what it is sent."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import ray
import torch
from torch import nn

from orchard.errors import EngineError, WeightMismatchError
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.policy.model import load
from orchard.policy.weights import Weights, digest, snapshot
from orchard.scorers.prefix_critic import PrefixCritic
from orchard.settings import RolloutConfig
from orchard.types import PolicyVersion, Prompts, SearchTrees
from rollout.candidates import Candidates
from rollout.engine.protocol import InferenceEngine
from rollout.engine.torch import TorchEngine
from rollout.engine.vllm import VllmEngine
from rollout.probe import LogprobProbe, verify
from rollout.search.beam import beam, sample
from rollout.search.registry import SearchContext, SearchFn, make_search
from rollout.search.think import think
from rollout.search.thoughts import Thoughts, attach_thoughts
from rollout.search_trees import build_search_trees


class RolloutWorker:
    """Searches with one engine. What it returns depends on its policy and the arguments alone."""

    def __init__(
        self,
        config: RolloutConfig,
        folder: Path,
        tokenizer: ItemTokenizer,
        seed: int,
        critic: PrefixCritic | None = None,
    ) -> None:
        """Start with the policy saved in `folder`, as step 0, until another is installed.

        A `critic` guides in the place of the policy's own value head.

        Raises:
            DataError: the folder holds no policy.
            EngineError: the engine cannot be had on this machine.
        """
        self._config, self._tokenizer, self._critic = config, tokenizer, critic
        torch.set_num_threads(config.threads)
        model = load(folder, tokenizer)
        version = PolicyVersion(step=0, digest=digest(snapshot(model)))
        self._holder: InferenceEngine
        if config.engine == "vllm":
            self._holder = VllmEngine(folder, model, tokenizer, version, config, seed=seed)
        else:
            device = "cuda" if config.gpus else "cpu"
            nn.Module.to(model, device=device, dtype=getattr(torch, config.dtype))
            self._holder = TorchEngine(model, tokenizer, version)
        self._fit = True
        """False from when weights are installed until their probe is answered rightly."""

    def load_weights(
        self, version: PolicyVersion, weights: Weights, probe: LogprobProbe | None = None
    ) -> PolicyVersion:
        """Search with these weights from now on; returns the version held then.

        Raises:
            UnfitError: the probe is answered otherwise than the learner does. Nothing is searched
                from then on, until an installation succeeds.
        """
        self._holder.load_weights(version, weights)
        self._fit = False
        if probe is not None:
            verify(self._holder, probe)
        self._fit = True
        return self._holder.version

    def version(self) -> PolicyVersion:
        """The policy that searches now."""
        return self._holder.version

    def search(self, prompts: Prompts, seed: int, kind: str | None = None) -> SearchTrees:
        """A tree per prompt, by the configured search or by that of another kind."""
        wanted = kind or self._config.search
        if wanted == "think":
            return self._think_and_search(prompts, seed)
        given = SearchContext(
            config=self._config, catalog=self._tokenizer.catalog, seed=seed, critic=self._critic
        )
        find = make_search(wanted, given)
        found = self._in_batches(prompts, find)
        return build_search_trees(prompts, found, self._tokenizer, self._holder.version)

    def rank(self, prompts: Prompts, beams: int, thinking: bool = False) -> Candidates:
        """The best `beams` leaves of each prompt, whatever the configured search.

        With `thinking`, those after the policy's likeliest thought.
        """
        if not thinking:
            return self._in_batches(prompts, partial(beam, width=beams))
        began = perf_counter()
        thoughts = self._thoughts(prompts, count=1, temperature=0.0, seed=0)
        found = self._in_batches(thoughts.contexts(prompts), partial(beam, width=beams))
        cost = thoughts.cost + found.cost
        return replace(found, cost=replace(cost, seconds=perf_counter() - began))

    def _think_and_search(self, prompts: Prompts, seed: int) -> SearchTrees:
        """Thoughts, then codes after each of them."""
        began, config = perf_counter(), self._config
        heat = config.temperature
        thoughts = self._thoughts(prompts, count=config.group_size, temperature=heat, seed=seed)
        find: SearchFn = partial(sample, count=config.think.width, temperature=heat, seed=seed)
        if config.think.codes == "beam":
            find = partial(beam, width=config.think.width)
        contexts, version = thoughts.contexts(prompts), self._holder.version
        found = self._in_batches(contexts, find)
        codes = build_search_trees(contexts, found, self._tokenizer, version)
        trees = attach_thoughts(prompts, thoughts, codes, self._tokenizer.catalog.trie.depth)
        return replace(trees, cost=replace(trees.cost, seconds=perf_counter() - began))

    def _thoughts(self, prompts: Prompts, *, count: int, temperature: float, seed: int) -> Thoughts:
        if (tags := self._tokenizer.think) is None:
            raise EngineError(
                "the policy has no tags to think between; warm-start it on rationales "
                "(data.rationales), or choose a search without thoughts"
            )
        return think(
            self._holder.generate,
            prompts,
            tags,
            count=count,
            blocks=self._tokenizer.catalog.trie.depth,
            cap=self._config.think.block_tokens,
            temperature=temperature,
            seed=seed,
        )

    def _in_batches(self, prompts: Prompts, find: SearchFn) -> Candidates:
        """What `find` finds, in batches of the configured size."""
        if not self._fit:
            raise WeightMismatchError(
                f"policy {self._holder.version} failed its probe here; install a version first"
            )
        began = perf_counter()
        # Prompts of like length go together, so that little of a batch is padding.
        order = np.argsort(np.diff(prompts.token_start), kind="stable")
        size = self._config.batch_size
        rows = [order[at : at + size] for at in range(0, len(order), size)]
        found = Candidates.concatenate(
            [self._holder.run(find, prompts.select(one)) for one in rows]
        )
        cost = replace(found.cost, seconds=perf_counter() - began)
        return replace(found.select(np.argsort(order)), cost=cost)


RolloutActor: Any = ray.remote(RolloutWorker)
