"""Registry of the search algorithms that `rollout.search` names.

A search is one function from prompts to search trees. Most search codes alone: they are a function
that runs where the model is, and `SearchContext.search_codes` makes a search of it.

To add a search, write a `SearchFactory`, register it in `SEARCHES`, and add its name to the choices
of that setting. `docs/extending.md` has an example.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from orchard.catalog.catalog import Catalog
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.scorers.prefix_critic import PrefixCritic
from orchard.settings import RolloutConfig
from orchard.types import Prompts, SearchTrees
from rollout.engine.protocol import InferenceEngine, SearchFn
from rollout.search.add_target import search_with_target
from rollout.search.batches import search_in_batches
from rollout.search.beam import beam, sample
from rollout.search.sampling import beam_sample, dynamic
from rollout.search.think import search_after_thoughts
from rollout.search.ved.search import ved
from rollout.search_trees import build_search_trees

Search = Callable[[Prompts], SearchTrees]
"""Search: from prompts to one search tree per prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchContext:
    """Inputs from which a `SearchFactory` makes a search."""

    config: RolloutConfig
    engine: InferenceEngine
    tokenizer: ItemTokenizer
    seed: int
    """Random seed of the training step."""
    step: int | None = None
    """Number of updates before the training step; None outside of training."""
    critic: PrefixCritic | None = None
    """Critic that guides `ved` instead of the policy's value head."""

    @property
    def catalog(self) -> Catalog:
        """Catalog whose trie constrains the search."""
        return self.tokenizer.catalog

    def search_codes(self, search_fn: SearchFn) -> Search:
        """Return the search that runs the picklable `search_fn` where the model is.

        It adds missed targets if `rollout.add_target` is set.
        """
        if self.config.add_target:
            search_fn = partial(search_with_target, search_fn=search_fn, catalog=self.catalog)

        def search(prompts: Prompts) -> SearchTrees:
            size = self.config.batch_size
            candidates = search_in_batches(self.engine, search_fn, prompts, size=size)
            return build_search_trees(prompts, candidates, self.tokenizer, self.engine.version)

        return search


SearchFactory = Callable[[SearchContext], Search]
"""Factory of a search from its context."""


def _beam(ctx: SearchContext) -> Search:
    return ctx.search_codes(partial(beam, width=ctx.config.group_size))


def _beam_sample(ctx: SearchContext) -> Search:
    width, temperature = ctx.config.group_size, ctx.config.temperature
    return ctx.search_codes(
        partial(beam_sample, width=width, temperature=temperature, seed=ctx.seed)
    )


def _sample(ctx: SearchContext) -> Search:
    count, temperature = ctx.config.group_size, ctx.config.temperature
    return ctx.search_codes(partial(sample, count=count, temperature=temperature, seed=ctx.seed))


def _dynamic(ctx: SearchContext) -> Search:
    return ctx.search_codes(
        partial(
            dynamic,
            catalog=ctx.catalog,
            count=ctx.config.group_size,
            temperature=ctx.config.temperature,
            seed=ctx.seed,
        )
    )


def _ved(ctx: SearchContext) -> Search:
    config = ctx.config
    if ctx.step is not None and ctx.step < config.ved.warmup:
        return _beam(ctx)  # provides the training data until the value head is warmed up
    count, critic = config.group_size, ctx.critic
    return ctx.search_codes(
        partial(ved, settings=config.ved, count=count, seed=ctx.seed, critic=critic)
    )


def _think(ctx: SearchContext) -> Search:
    return partial(search_after_thoughts, ctx.engine, ctx.tokenizer, ctx.config, seed=ctx.seed)


SEARCHES: dict[str, SearchFactory] = {
    "beam": _beam,
    "beam_sample": _beam_sample,
    "sample": _sample,
    "dynamic": _dynamic,
    "ved": _ved,
    "think": _think,
}


def make_search(name: str, ctx: SearchContext) -> Search:
    """Make the search called `name`."""
    return SEARCHES[name](ctx)
