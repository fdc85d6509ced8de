"""Leave out what the rewards know from a prompt's own row.

Shapes:  B prompts   B1 = B + 1   H history leaves of prompts   R counted rows   R1 = R + 1
         M history leaves of counted rows   C candidates
         L1 = L + 1, the root and the codes of the longest item
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from orchard import ragged
from orchard.catalog.catalog import Catalog
from orchard.feedback.utilities import LeftOut, PrefixUtilities
from orchard.types import Prompts, SearchTrees


def own_rows(
    row: Int64[np.ndarray, " B"],
    prompts: tuple[Int64[np.ndarray, " H"], Int64[np.ndarray, " B1"], Int64[np.ndarray, " B"]],
    counted: tuple[Int64[np.ndarray, " M"], Int64[np.ndarray, " R1"], Int64[np.ndarray, " R"]],
) -> Int64[np.ndarray, " B"]:
    """Return the supposed row of each prompt where it has the prompt's items, else -1.

    A prompt of another split may have the number of a counted row: its items tell.

    Args:
        row: supposed row of each prompt, of any value.
        prompts: history leaves of the prompts, their starts, and their target leaves.
        counted: history leaves of the counted rows, their starts, and their target leaves.
    """
    history, start, target = prompts
    their_history, their_start, their_target = counted
    row = np.where((row >= 0) & (row < len(their_target)), row, 0)
    same = their_target[row] == target
    same &= np.diff(their_start)[row] == np.diff(start)
    kept = np.flatnonzero(same)
    mine, bounds = ragged.take(history, start, kept)
    theirs, _ = ragged.take(their_history, their_start, row[kept])
    differing = np.bincount(ragged.row_of(bounds)[mine != theirs], minlength=len(kept))
    same[kept] = differing == 0
    return np.where(same, row, -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptUtilities:
    """Utilities of a catalog's prefixes, and which prompts they were fitted on."""

    utilities: PrefixUtilities
    catalog: Catalog
    first_row: int | None
    """Index among the fitted requests of the prompt with id 0; None if prompts are not among
    them."""

    def own_request(self, prompts: Prompts) -> Int64[np.ndarray, " B"]:
        """Return the fitted request of each prompt, -1 for one that was not fitted."""
        if self.first_row is None:
            return np.full(len(prompts), -1)
        leaf_of_item, examples = self.catalog.leaf_of_item.astype(np.int64), self.utilities.examples
        return own_rows(
            prompts.id + self.first_row,
            (leaf_of_item[prompts.history], prompts.history_start, leaf_of_item[prompts.target]),
            (examples.history, examples.start, examples.target),
        )

    def of(self, trees: SearchTrees) -> Float64[np.ndarray, "C L1"]:
        """Return the utilities of the root and of each prefix of every candidate."""
        prompts = trees.prompts
        history = self.catalog.leaf_of_item[prompts.history].astype(np.int64)
        cluster = self.utilities.cluster_of(history, prompts.history_start)
        left_out = LeftOut.of(self.utilities.examples, self.own_request(prompts))
        return self.utilities.values(
            cluster, trees.prompt_of_candidate, trees.leaf.astype(np.int64), left_out
        )
