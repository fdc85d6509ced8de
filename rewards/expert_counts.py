"""Counts behind the experts of a guide, from which a prompt's own row or user can be left out.

Shapes:  B prompts   R counted rows   K leaves   O left-out rows
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from orchard import ragged
from orchard.errors import ConfigError
from orchard.guide.expert import LeafRows
from orchard.guide.guide import Guide
from orchard.guide.left_out import Counted
from orchard.guide.registry import EXPERTS
from orchard.types import Prompts
from rewards.left_out import own_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCounts:
    """Guide, the rows that it counts, and the counts behind each of its experts."""

    guide: Guide
    rows: LeafRows
    first_row: int | None
    """Index among the rows of the prompt with id 0; None if prompts are not among them."""
    counted: tuple[Counted, ...]
    """Counts of each expert."""
    popularity: Int64[np.ndarray, " K"]
    """Number of rows with each leaf as target."""
    row_of_user: Int64[np.ndarray, " R"]
    """Rows in the order of their users."""
    user: Int64[np.ndarray, " R"]
    """User of each of these, ascending."""

    @classmethod
    def of(
        cls, guide: Guide | None, rows: LeafRows | None, first_row: int | None
    ) -> "ExpertCounts":
        """Count the rows for the experts of a guide.

        Raises:
            ConfigError: there is no guide, or a row cannot be taken out of one of its experts.
        """
        if guide is None or rows is None:
            raise ConfigError(
                "the reward expert needs a guide, and the policy that training starts from has "
                "none; run `orchard fit guide`, or take expert out of rewards.weights",
                code="config.no_guide",
            )
        counted = list[Counted]()
        for entry in guide.experts:
            factory = EXPERTS.facts(entry.name).counts if entry.name in EXPERTS else None
            if factory is None:
                raise ConfigError(
                    f"the guide has the expert {entry.name}, from which the part of a row cannot "
                    "be subtracted, so the reward expert would leak the target of each row; "
                    "register it with counts, or fit a guide without it (guide.experts)",
                    code="config.expert_without_counts",
                )
            counted.append(factory(rows))
        order = np.argsort(rows.user, kind="stable")
        return cls(
            guide=guide,
            rows=rows,
            first_row=first_row,
            counted=tuple(counted),
            popularity=rows.popularity,
            row_of_user=order,
            user=rows.user[order],
        )

    def own_row(self, prompts: Prompts) -> Int64[np.ndarray, " B"]:
        """Return the counted row of each prompt, -1 for one that was not counted."""
        if self.first_row is None:
            return np.full(len(prompts), -1)
        leaf_of_item, rows = self.guide.catalog.leaf_of_item.astype(np.int64), self.rows
        own = own_rows(
            prompts.id + self.first_row,
            (leaf_of_item[prompts.history], prompts.history_start, leaf_of_item[prompts.target]),
            (rows.history.astype(np.int64), rows.start, rows.target.astype(np.int64)),
        )
        return np.where((own >= 0) & rows.is_counted[own], own, -1)

    def left_out(
        self, own: Int64[np.ndarray, " B"], unit: str
    ) -> tuple[LeafRows, Int64[np.ndarray, " O"]]:
        """Return the rows to leave out for each prompt, and the prompt of each.

        Args:
            own: counted row of each prompt, or -1.
            unit: "row" leaves out the row itself, "user" all rows of its user.
        """
        prompt = np.flatnonzero(own >= 0)
        row = own[prompt]
        if unit == "user":
            user = self.rows.user[row]
            first = np.searchsorted(self.user, user)
            count = np.searchsorted(self.user, user, side="right") - first
            row = self.row_of_user[ragged.ranges(first, count)]
            prompt = np.repeat(prompt, count)
        history, start = ragged.take(self.rows.history, self.rows.start, row)
        left = LeafRows(
            num_leaves=self.rows.num_leaves,
            user=self.rows.user[row],
            history=history,
            start=start,
            target=self.rows.target[row],
            weight=None if self.rows.weight is None else self.rows.weight[row],
        )
        return left, prompt
