"""Registry of the search algorithms that `rollout.search` names.

To add a search, write a `SearchFactory` in a module of its own and register it in `SEARCHES`.
`docs/extending.md` has an example.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from orchard.catalog.catalog import Catalog
from orchard.catalog.trie import Trie
from orchard.errors import ConfigError
from orchard.guide.guide import Guide
from orchard.guide.values import Valuer
from orchard.registry import Facts, Registry
from orchard.scorers.prefix_critic import PrefixCritic
from orchard.settings import Config, RolloutConfig
from orchard.types import Prompts
from rollout.candidates import Candidates
from rollout.engine.protocol import DecodingBackend
from rollout.search.add_target import search_with_target
from rollout.search.beam import beam, sample
from rollout.search.sampling import beam_sample, dynamic
from rollout.search.ved.search import check_budget, ved

PROVED = 10
"""Number of first candidates of a guided beam that are proved to be the best, where they are."""

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
    """Critic that guides `ved` instead of the policy's value head, or `beam`."""
    guide: Guide | None = None
    """Guide of experts for `ved` or `beam`."""

    def valuer(self, name: str) -> Valuer | None:
        """Return the source of values called `name` in the settings; None for the head or none."""
        return {"critic": self.critic, "expert": self.guide}.get(name)


SearchFactory = Callable[[SearchContext], SearchFn]
"""Factory of a search: from its context to a picklable search function."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchFacts(Facts):
    """Properties of a search that a run looks up."""

    thinks: bool = False
    """Whether the policy generates thoughts first, so that the prompts of the search end in one."""
    uses_critic: Callable[[RolloutConfig], bool] | None = None
    """Whether a prefix critic guides the search under these settings; None if never."""
    uses_guide: Callable[[RolloutConfig], bool] | None = None
    """Whether a guide of experts guides the search under these settings; None if never."""
    check_catalog: Callable[[RolloutConfig, Trie], None] | None = None
    """Check of the settings against the catalog's trie; raises ConfigError."""


SEARCHES: Registry[SearchFactory, SearchFacts] = Registry(
    "search", ("rollout.search",), SearchFacts()
)
"""Searches by their name in `rollout.search`."""


@SEARCHES.register(
    "beam",
    SearchFacts(
        uses_critic=lambda config: config.guide == "critic",
        uses_guide=lambda config: config.guide == "expert",
    ),
)
def _beam(ctx: SearchContext) -> SearchFn:
    width, valuer = ctx.config.group_size, ctx.valuer(ctx.config.guide)
    if valuer is None:
        return partial(beam, width=width)
    return partial(beam, width=width, guide=valuer, prove=PROVED)


@SEARCHES.register("beam_sample")
def _beam_sample(ctx: SearchContext) -> SearchFn:
    config = ctx.config
    return partial(
        beam_sample, width=config.group_size, temperature=config.temperature, seed=ctx.seed
    )


@SEARCHES.register("sample")
def _sample(ctx: SearchContext) -> SearchFn:
    config = ctx.config
    return partial(sample, count=config.group_size, temperature=config.temperature, seed=ctx.seed)


@SEARCHES.register("dynamic")
def _dynamic(ctx: SearchContext) -> SearchFn:
    config = ctx.config
    return partial(
        dynamic,
        catalog=ctx.catalog,
        count=config.group_size,
        temperature=config.temperature,
        seed=ctx.seed,
    )


def _needs_values(config: Config) -> None:
    """Refuse a search guided by the value head of a policy that has none."""
    if config.rollout.ved.guide == "head" and not config.model.value_head:
        raise ConfigError(
            'rollout.search = "ved" is guided by values; set model.value_head = true or '
            'rollout.ved.guide = "critic", or choose another search',
            code="config.no_values",
        )


@SEARCHES.register(
    "ved",
    SearchFacts(
        rules=(_needs_values,),
        uses_critic=lambda config: config.ved.guide == "critic",
        uses_guide=lambda config: config.ved.guide == "expert",
        check_catalog=lambda config, trie: check_budget(config.ved, trie),
    ),
)
def _ved(ctx: SearchContext) -> SearchFn:
    config, seed = ctx.config, ctx.seed
    count, critic = config.group_size, ctx.valuer(config.ved.guide)
    return partial(ved, settings=config.ved, count=count, seed=seed, critic=critic)


def _adds_no_target(config: Config) -> None:
    """Refuse to add targets after thoughts that the policy has not had."""
    if config.rollout.add_target:
        raise ConfigError(
            'rollout.add_target = true has no effect with rollout.search = "think"; leave one '
            "of them out",
            code="config.target_without_thought",
        )


def _trains_no_values(config: Config) -> None:
    """Refuse a value head, which learns from codes alone."""
    if config.model.value_head:
        raise ConfigError(
            'model.value_head = true learns from codes alone, rollout.search = "think" gives '
            "it blocks of thought; switch one of them off",
            code="config.values_of_thoughts",
        )


@SEARCHES.register("think", SearchFacts(rules=(_adds_no_target, _trains_no_values), thinks=True))
def _codes_after_thought(ctx: SearchContext) -> SearchFn:
    config = ctx.config
    if config.think.codes == "beam":
        return partial(beam, width=config.think.width)
    return partial(sample, count=config.think.width, temperature=config.temperature, seed=ctx.seed)


def make_search(name: str, ctx: SearchContext) -> SearchFn:
    """Make the search called `name`, which adds missed targets if `rollout.add_target` is set."""
    search_fn = SEARCHES[name](ctx)
    if ctx.config.add_target:
        return partial(search_with_target, find=search_fn, catalog=ctx.catalog)
    return search_fn
