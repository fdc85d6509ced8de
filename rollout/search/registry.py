"""The searches of `rollout.search`, but for `think`, which writes before it searches.

To add one, write a function of the type `Search`, give it a name in `SEARCHES`, and add the name to
the choices of that setting. `docs/extending.md` has an example.
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
from rollout.search.add_target import inject_target
from rollout.search.beam import beam, sample
from rollout.search.sampling import beam_sample, dynamic
from rollout.search.ved.search import ved

SearchFn = Callable[[DecodingBackend, Prompts], Candidates]
"""Asks an engine for log-probabilities below a batch of prompts, and returns what it found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchContext:
    """What a search may be made of."""

    config: RolloutConfig
    catalog: Catalog
    seed: int
    """Of the step."""
    critic: PrefixCritic | None = None
    """Guides `ved` in the place of the policy's value head."""


SearchFactory = Callable[[SearchContext], SearchFn]
"""From what is given to a function that an engine can be sent."""


def _beam(given: SearchContext) -> SearchFn:
    return partial(beam, width=given.config.group_size)


def _beam_sample(given: SearchContext) -> SearchFn:
    config = given.config
    return partial(
        beam_sample, width=config.group_size, temperature=config.temperature, seed=given.seed
    )


def _sample(given: SearchContext) -> SearchFn:
    config = given.config
    return partial(sample, count=config.group_size, temperature=config.temperature, seed=given.seed)


def _dynamic(given: SearchContext) -> SearchFn:
    config = given.config
    return partial(
        dynamic,
        catalog=given.catalog,
        count=config.group_size,
        temperature=config.temperature,
        seed=given.seed,
    )


def _ved(given: SearchContext) -> SearchFn:
    config, seed = given.config, given.seed
    count, critic = config.group_size, given.critic
    return partial(ved, settings=config.ved, count=count, seed=seed, critic=critic)


SEARCHES: dict[str, SearchFactory] = {
    "beam": _beam,
    "beam_sample": _beam_sample,
    "sample": _sample,
    "dynamic": _dynamic,
    "ved": _ved,
}


def make_search(name: str, given: SearchContext) -> SearchFn:
    """The search of a name, which puts targets in where the settings say so."""
    find = SEARCHES[name](given)
    if given.config.add_target:
        return partial(inject_target, find=find, catalog=given.catalog)
    return find
