"""Registry of the search algorithms that `rollout.search` names, except `think`.

`think` generates text before it searches: see `rollout.actor`.

To add a search, write a `SearchFactory`, register it in `SEARCHES`, and add its name to the choices
of that setting. `docs/extending.md` has an example.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from orchard.catalog.catalog import Catalog
from orchard.scorers.prefix_critic import PrefixCritic
from orchard.settings import RolloutConfig
from orchard.types import Prompts
from rollout.candidates import Candidates
from rollout.engine.protocol import DecodingBackend
from rollout.search.add_target import search_with_target
from rollout.search.beam import beam, sample
from rollout.search.sampling import beam_sample, dynamic
from rollout.search.ved.search import ved

SearchFn = Callable[[DecodingBackend, Prompts], Candidates]
"""Search function: from a decoding backend and a batch of prompts to candidates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchContext:
    """Inputs from which a `SearchFactory` makes a search."""

    config: RolloutConfig
    catalog: Catalog
    seed: int
    """Random seed of the training step."""
    critic: PrefixCritic | None = None
    """Critic that guides `ved` instead of the policy's value head."""


SearchFactory = Callable[[SearchContext], SearchFn]
"""Factory of a search: from its context to a picklable search function."""


def _beam(ctx: SearchContext) -> SearchFn:
    return partial(beam, width=ctx.config.group_size)


def _beam_sample(ctx: SearchContext) -> SearchFn:
    config = ctx.config
    return partial(
        beam_sample, width=config.group_size, temperature=config.temperature, seed=ctx.seed
    )


def _sample(ctx: SearchContext) -> SearchFn:
    config = ctx.config
    return partial(sample, count=config.group_size, temperature=config.temperature, seed=ctx.seed)


def _dynamic(ctx: SearchContext) -> SearchFn:
    config = ctx.config
    return partial(
        dynamic,
        catalog=ctx.catalog,
        count=config.group_size,
        temperature=config.temperature,
        seed=ctx.seed,
    )


def _ved(ctx: SearchContext) -> SearchFn:
    config, seed = ctx.config, ctx.seed
    count, critic = config.group_size, ctx.critic
    return partial(ved, settings=config.ved, count=count, seed=seed, critic=critic)


SEARCHES: dict[str, SearchFactory] = {
    "beam": _beam,
    "beam_sample": _beam_sample,
    "sample": _sample,
    "dynamic": _dynamic,
    "ved": _ved,
}


def make_search(name: str, ctx: SearchContext) -> SearchFn:
    """Make the search called `name`, which adds missed targets if `rollout.add_target` is set."""
    search_fn = SEARCHES[name](ctx)
    if ctx.config.add_target:
        return partial(search_with_target, find=search_fn, catalog=ctx.catalog)
    return search_fn
