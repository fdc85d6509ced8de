"""The searches of `rollout.search`, but for `think`, which writes before it searches.

To add one, write a function of the type `Search`, give it a name in `SEARCHES`, and add the name to
the choices of that setting. `docs/extending.md` has an example.
"""

from collections.abc import Callable
from functools import partial

from orchard.catalogue import Catalogue
from orchard.config import RolloutConfig
from orchard.types import Prompts
from rollout.candidates import Candidates
from rollout.draws import beam_sample, dynamic
from rollout.engine import Engine
from rollout.search import beam, sample
from rollout.targets import with_target
from rollout.ved import ved

Find = Callable[[Engine, Prompts], Candidates]
"""Asks an engine for log-probabilities below a batch of prompts, and returns what it found."""
Search = Callable[[RolloutConfig, Catalogue, int], Find]
"""Settings, catalogue and seed of the step to a function that an engine can be sent."""


def _beam(config: RolloutConfig, catalogue: Catalogue, seed: int) -> Find:
    return partial(beam, width=config.candidates)


def _beam_sample(config: RolloutConfig, catalogue: Catalogue, seed: int) -> Find:
    heat = config.temperature
    return partial(beam_sample, width=config.candidates, temperature=heat, seed=seed)


def _sample(config: RolloutConfig, catalogue: Catalogue, seed: int) -> Find:
    return partial(sample, count=config.candidates, temperature=config.temperature, seed=seed)


def _dynamic(config: RolloutConfig, catalogue: Catalogue, seed: int) -> Find:
    count, heat = config.candidates, config.temperature
    return partial(dynamic, catalogue=catalogue, count=count, temperature=heat, seed=seed)


def _ved(config: RolloutConfig, catalogue: Catalogue, seed: int) -> Find:
    return partial(ved, settings=config.ved, count=config.candidates, seed=seed)


SEARCHES: dict[str, Search] = {
    "beam": _beam,
    "beam_sample": _beam_sample,
    "sample": _sample,
    "dynamic": _dynamic,
    "ved": _ved,
}


def search_of(name: str, config: RolloutConfig, catalogue: Catalogue, seed: int) -> Find:
    """The search of a name, which puts targets in where the settings say so."""
    find = SEARCHES[name](config, catalogue, seed)
    return partial(with_target, find=find, catalogue=catalogue) if config.add_target else find
