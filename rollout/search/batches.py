"""Run a search in batches of prompts of similar length."""

from dataclasses import replace
from time import perf_counter

import numpy as np

from orchard.types import Prompts
from rollout.candidates import Candidates
from rollout.engine.protocol import SearchFn, SearchRunner


def search_in_batches(
    engine: SearchRunner, search_fn: SearchFn, prompts: Prompts, *, size: int
) -> Candidates:
    """Run the picklable `search_fn` on batches of `size` prompts.

    The candidates are in the order of the prompts; their cost has the seconds of all batches.
    """
    began = perf_counter()
    # Batches of prompts of similar length, to limit padding.
    order = np.argsort(np.diff(prompts.token_start), kind="stable")
    batches = [order[first : first + size] for first in range(0, len(order), size)]
    candidates = Candidates.concatenate(
        [engine.run(search_fn, prompts.select(rows)) for rows in batches]
    )
    cost = replace(candidates.cost, seconds=perf_counter() - began)
    # argsort(order) inverts the permutation.
    return replace(candidates.select(np.argsort(order)), cost=cost)
