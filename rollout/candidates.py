"""Candidates: the catalog leaves that a search returns for a batch of prompts.

Shapes:  B prompts   C candidates   D longest sequence   R selected prompts   B1 = B + 1
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from jaxtyping import Bool, Float32, Int64

from orchard import arrays
from orchard.arrays import Merge, Starts
from orchard.types import Cost, sum_costs


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """Catalog leaves of each prompt, best first within the prompt."""

    start: Annotated[Int64[np.ndarray, " B1"], Starts("C")]
    """Boundaries: the candidates of prompt b are `start[b] : start[b + 1]`."""
    node: Int64[np.ndarray, "C D"]
    """Trie node of each candidate at each depth 1..D, -1 past its end."""
    logprob: Float32[np.ndarray, "C D"]
    """Log-probability of the code into each node; 0 for forced codes and past the end."""
    score: Float32[np.ndarray, " C"]
    """Log-probability of the leaf given the prompt."""
    leaf: Int64[np.ndarray, " C"]
    """Catalog leaf of each candidate."""
    cost: Annotated[Cost, Merge(sum_costs)]
    value: Float32[np.ndarray, "C D"] | None = None
    """Value of the prefix that ends with each code, NaN where it was not computed; None if the
    search does not use values."""
    proved: Bool[np.ndarray, " B"] | None = None
    """Whether the first candidates of each prompt are proved to be the best of the whole catalog;
    None if the search does not prove it."""

    @property
    def count(self) -> Int64[np.ndarray, " B"]:
        """Number of candidates of each prompt, below the requested width if leaves are too few."""
        return np.diff(self.start)

    def select(self, rows: Int64[np.ndarray, " R"]) -> "Candidates":
        """Return the candidates of the prompts `rows`, in that order; the cost is unchanged."""
        return arrays.select(self, rows)

    @staticmethod
    def concatenate(parts: "Sequence[Candidates]") -> "Candidates":
        """Concatenate batches in order and sum their costs."""
        return arrays.concatenate(parts)
