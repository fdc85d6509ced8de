"""Candidates: the catalog leaves that a search returns for a batch of prompts.

Shapes:  B prompts   C candidates   D longest sequence   R selected prompts   B1 = B + 1
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int64

from orchard import ragged
from orchard.types import Cost, concatenate_optional


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """Catalog leaves of each prompt, best first within the prompt."""

    start: Int64[np.ndarray, " B1"]
    """Boundaries: the candidates of prompt b are `start[b] : start[b + 1]`."""
    node: Int64[np.ndarray, "C D"]
    """Trie node of each candidate at each depth 1..D, -1 past its end."""
    logprob: Float32[np.ndarray, "C D"]
    """Log-probability of the code into each node; 0 for forced codes and past the end."""
    score: Float32[np.ndarray, " C"]
    """Log-probability of the leaf given the prompt."""
    leaf: Int64[np.ndarray, " C"]
    """Catalog leaf of each candidate."""
    cost: Cost
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
        count = np.diff(self.start)[rows]
        candidate_index = ragged.ranges(self.start[rows], count)
        return Candidates(
            start=ragged.starts(count),
            node=self.node[candidate_index],
            logprob=self.logprob[candidate_index],
            score=self.score[candidate_index],
            leaf=self.leaf[candidate_index],
            cost=self.cost,
            value=None if self.value is None else self.value[candidate_index],
            proved=None if self.proved is None else self.proved[rows],
        )

    @staticmethod
    def concatenate(parts: "Sequence[Candidates]") -> "Candidates":
        """Concatenate batches in order and sum their costs."""
        leaf, start = ragged.concatenate([(p.leaf, p.start) for p in parts])
        proved = [p.proved for p in parts if p.proved is not None]
        return Candidates(
            start=start,
            node=np.concatenate([p.node for p in parts]),
            logprob=np.concatenate([p.logprob for p in parts]),
            score=np.concatenate([p.score for p in parts]),
            leaf=leaf,
            cost=sum((p.cost for p in parts), Cost()),
            value=concatenate_optional([p.value for p in parts]),
            proved=np.concatenate(proved) if len(proved) == len(parts) else None,
        )
