"""Protocol of everything that values prefixes of codes after a history, to guide a search.

Shapes:  F prefixes
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64
from torch import Tensor

from orchard.catalog.catalog import Catalog
from orchard.types import Prompts

Values = Callable[[Int64[np.ndarray, " F"], Int64[Tensor, " F"]], Float32[np.ndarray, " F"]]
"""Function of prompt indices and trie nodes that returns the value of each node to its prompt."""


@runtime_checkable
class Valuer(Protocol):
    """Source of values: a guide, or a prefix critic."""

    @property
    def catalog(self) -> Catalog:
        """Catalog whose trie nodes are valued."""
        ...

    def values(self, prompts: Prompts) -> Values:
        """Read the prompts' histories and return a function that values prefixes after them."""
        ...
