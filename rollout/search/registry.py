"""Registry of the search algorithms that `rollout.search` names.

A search is one function from prompts to search trees. Most search codes alone: they are a function
that runs where the model is, and `SearchContext.search_codes` makes a search of it.

To add a search, write a `SearchFactory` in a module of its own and register it in `SEARCHES`.
`docs/extending.md` has an example.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from orchard.catalog.catalog import Catalog
from orchard.catalog.trie import Trie
from orchard.catalog.view import full_view
from orchard.errors import ConfigError
from orchard.guide.guide import Guide
from orchard.guide.values import Valuer
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.registry import Facts, Registry
from orchard.scorers.prefix_critic import PrefixCritic
from orchard.settings import Config, RolloutConfig
from orchard.settings.widths import of_levels
from orchard.types import Prompts, SearchTrees
from rollout.engine.protocol import InferenceEngine, SearchFn
from rollout.search.add_target import search_with_target
from rollout.search.batches import search_in_batches
from rollout.search.beam import beam
from rollout.search.draws import sample
from rollout.search.hints import check_hints, mark_hint, search_below_hint
from rollout.search.logged import logged
from rollout.search.sampling import beam_sample, dynamic
from rollout.search.think import search_after_thoughts
from rollout.search.ved.search import check_budget, ved
from rollout.search_trees import build_search_trees

PROVED = 10
"""Number of first candidates of a guided beam that are proved to be the best, where they are."""

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
    """Critic that guides `ved` instead of the policy's value head, or `beam`."""
    guide: Guide | None = None
    """Guide of experts for `ved` or `beam`."""
    hint: int = 0
    """Number of first codes of its target that each prompt is given; 0 for none."""

    def valuer(self, name: str) -> Valuer | None:
        """Return the source of values called `name` in the settings; None for the head or none."""
        return {"critic": self.critic, "expert": self.guide}.get(name.removesuffix("+head"))

    @property
    def catalog(self) -> Catalog:
        """Catalog whose trie constrains the search."""
        return self.tokenizer.catalog

    def search_codes(self, search_fn: SearchFn) -> Search:
        """Return the search that runs the picklable `search_fn` where the model is.

        It adds missed targets if `rollout.add_target` is set, and searches below a hint if there
        is one.
        """
        if self.hint:
            view = full_view(self.catalog.trie)
            search_fn = partial(search_below_hint, search_fn=search_fn, view=view, codes=self.hint)
        if self.config.add_target:
            search_fn = partial(search_with_target, search_fn=search_fn, catalog=self.catalog)

        def search(prompts: Prompts) -> SearchTrees:
            size = self.config.batch_size
            candidates = search_in_batches(self.engine, search_fn, prompts, size=size)
            trees = build_search_trees(prompts, candidates, self.tokenizer, self.engine.version)
            return mark_hint(trees, self.hint) if self.config.hints else trees

        return search


SearchFactory = Callable[[SearchContext], Search]
"""Factory of a search from its context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchFacts(Facts):
    """Properties of a search that a run looks up."""

    thinks: bool = False
    """Whether the policy generates thoughts before it searches codes."""
    uses_critic: Callable[[RolloutConfig], bool] | None = None
    """Whether a prefix critic guides the search under these settings; None if never."""
    uses_guide: Callable[[RolloutConfig], bool] | None = None
    """Whether a guide of experts guides the search under these settings; None if never."""
    logged: bool = False
    """Whether its candidates are the shown items of feedback, each of which is a prompt."""
    takes_filter: bool = False
    """Whether its function of codes takes an item filter as `allowed`, as `rollout.hints` needs."""
    check_catalog: Callable[[RolloutConfig, Trie], None] | None = None
    """Check of the settings against the catalog's trie; raises ConfigError."""


def _hints_fit(config: Config) -> None:
    """Refuse hints where no search can use them or no group needs them."""
    rollout = config.rollout
    if rollout.hints and not SEARCHES.facts(rollout.search).takes_filter:
        known = [name for name in SEARCHES if SEARCHES.facts(name).takes_filter]
        raise ConfigError(
            f"rollout.hints = {rollout.hints} searches below a prefix of the target, which "
            f"rollout.search = {rollout.search} cannot; choose from {', '.join(known)}",
            code="config.hints_of_other_search",
        )
    if rollout.hints and rollout.add_target:
        raise ConfigError(
            "rollout.add_target = true puts the target into every group, so no group needs a "
            f"hint; leave out rollout.hints = {rollout.hints} or rollout.add_target",
            code="config.hints_beside_targets",
        )


SEARCHES: Registry[SearchFactory, SearchFacts] = Registry(
    "search", ("rollout.search",), SearchFacts(), rules=(_hints_fit,)
)
"""Searches by their name in `rollout.search`."""


def _uses_head(config: RolloutConfig) -> bool:
    """Return whether the value head of the policy guides the beam."""
    return config.guide.endswith("head")


def _needs_head(config: Config) -> None:
    """Refuse a beam guided by the value head of a policy that has none."""
    if _uses_head(config.rollout) and not config.model.value_head:
        raise ConfigError(
            f'rollout.guide = "{config.rollout.guide}" ranks by the values of the policy; set '
            "model.value_head = true, or choose another guide",
            code="config.no_values",
        )


def _check_widths(config: RolloutConfig, trie: Trie) -> None:
    """Refuse a list of widths for another number of levels."""
    of_levels(config.beam_width, trie.depth, "rollout.width")


@SEARCHES.register(
    "beam",
    SearchFacts(
        rules=(_needs_head,),
        takes_filter=True,
        uses_critic=lambda config: config.guide == "critic",
        uses_guide=lambda config: config.guide.startswith("expert"),
        check_catalog=_check_widths,
    ),
)
def _beam(ctx: SearchContext) -> Search:
    search = partial(beam, width=ctx.config.beam_width)
    if ctx.config.width is not None:
        search = partial(search, count=ctx.config.group_size)
    valuer = ctx.valuer(ctx.config.guide)
    if _uses_head(ctx.config):
        return ctx.search_codes(partial(search, guide=valuer, head=True))
    if valuer is None:
        return ctx.search_codes(search)
    return ctx.search_codes(partial(search, guide=valuer, prove=PROVED))


@SEARCHES.register("beam_sample", SearchFacts(takes_filter=True))
def _beam_sample(ctx: SearchContext) -> Search:
    width, temperature = ctx.config.group_size, ctx.config.temperature
    return ctx.search_codes(
        partial(beam_sample, width=width, temperature=temperature, seed=ctx.seed)
    )


@SEARCHES.register("sample", SearchFacts(takes_filter=True))
def _sample(ctx: SearchContext) -> Search:
    count, temperature = ctx.config.group_size, ctx.config.temperature
    return ctx.search_codes(partial(sample, count=count, temperature=temperature, seed=ctx.seed))


@SEARCHES.register("dynamic")
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
        takes_filter=True,
        uses_critic=lambda config: config.ved.guide == "critic",
        uses_guide=lambda config: config.ved.guide == "expert",
        check_catalog=lambda config, trie: check_budget(config.ved, trie),
    ),
)
def _ved(ctx: SearchContext) -> Search:
    config = ctx.config
    if ctx.step is not None and ctx.step < config.ved.warmup:
        return _beam(ctx)  # provides the training data until the value head is warmed up
    count, critic = config.group_size, ctx.valuer(config.ved.guide)
    return ctx.search_codes(
        partial(ved, settings=config.ved, count=count, seed=ctx.seed, critic=critic)
    )


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
def _think(ctx: SearchContext) -> Search:
    return partial(search_after_thoughts, ctx.engine, ctx.tokenizer, ctx.config, seed=ctx.seed)


def _needs_feedback(config: Config) -> None:
    """Refuse to score what was shown where nothing was."""
    if not config.data.feedback:
        raise ConfigError(
            'rollout.search = "logged" scores what was shown; set data.feedback to folders that '
            "`orchard data feedback` has made, or choose another search",
            code="config.no_feedback",
        )


@SEARCHES.register("logged", SearchFacts(rules=(_needs_feedback,), logged=True))
def _logged(ctx: SearchContext) -> Search:
    return ctx.search_codes(partial(logged, catalog=ctx.catalog))


def check_catalog(config: RolloutConfig, trie: Trie) -> None:
    """Raise ConfigError if the configured search, or its hints, do not fit the catalog's trie."""
    check_hints(config, trie)
    check = SEARCHES.facts(config.search).check_catalog
    if check is not None:
        check(config, trie)


def make_search(name: str, ctx: SearchContext) -> Search:
    """Make the search called `name`."""
    return SEARCHES[name](ctx)
