"""What a search finds.

Shapes:  B prompts   C candidates   D longest sequence   R prompts asked for   B1 = B + 1
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64

from orchard import ragged
from orchard.types import Cost, concatenate_optional


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """Catalog leaves found for each prompt, best first within it."""

    start: Int64[np.ndarray, " B1"]
    node: Int64[np.ndarray, "C D"]
    """Trie node at each depth 1..D, -1 past the end."""
    logprob: Float32[np.ndarray, "C D"]
    """Log-probability of the code into each of them; 0 where it was forced, and past the end."""
    score: Float32[np.ndarray, " C"]
    """Log-probability of the leaf given the prompt."""
    leaf: Int64[np.ndarray, " C"]
    cost: Cost
    value: Float32[np.ndarray, "C D"] | None = None
    """Value of the prefix that ends with each code, NaN where it was not asked for; None where the
    search is not guided by values."""

    @property
    def count(self) -> Int64[np.ndarray, " B"]:
        """Candidates of each prompt: fewer than asked for where fewer leaves may be found."""
        return np.diff(self.start)

    def select(self, rows: Int64[np.ndarray, " R"]) -> "Candidates":
        """The candidates of the given prompts, in the order asked for."""
        count = np.diff(self.start)[rows]
        which = ragged.ranges(self.start[rows], count)
        return Candidates(
            start=ragged.starts(count),
            node=self.node[which],
            logprob=self.logprob[which],
            score=self.score[which],
            leaf=self.leaf[which],
            cost=self.cost,
            value=None if self.value is None else self.value[which],
        )

    @staticmethod
    def concatenate(parts: "Sequence[Candidates]") -> "Candidates":
        """Several batches one after another; costs add up."""
        leaf, start = ragged.concatenate([(p.leaf, p.start) for p in parts])
        return Candidates(
            start=start,
            node=np.concatenate([p.node for p in parts]),
            logprob=np.concatenate([p.logprob for p in parts]),
            score=np.concatenate([p.score for p in parts]),
            leaf=leaf,
            cost=sum((p.cost for p in parts), Cost()),
            value=concatenate_optional([p.value for p in parts]),
        )
