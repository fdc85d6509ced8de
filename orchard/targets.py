"""Optional training targets of a batch: states for the value head, whole candidates for GSPO."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32, Int64


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueTargets:
    """Non-empty prefixes of a batch's candidates and the value targets of these states.

    Weights are shares of all states of all candidates of the whole batch.

    Shapes:  V states   P states of the longest path, the prompt's end included
    """

    row: Int64[np.ndarray, " V"]
    """Row of each state in the packed batch."""
    path: Int32[np.ndarray, "V P"]
    """Slots of the last prompt token and of the last token of each node down to the state, then
    -1."""
    reward: Float32[np.ndarray, " V"]
    """Reward of the step into the state."""
    outcome: Float32[np.ndarray, " V"]
    """Mean discounted return from the state on, over the candidates that pass through it."""
    through: Float32[np.ndarray, " V"]
    """Weight of the candidates that pass through the state."""
    entered: Float32[np.ndarray, " V"]
    """Weight of the candidates that enter from another state: `through`, but 0 at the prompt's
    end."""
    ending: Float32[np.ndarray, " V"]
    """Weight of the candidates that end in the state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceTargets:
    """Candidates of a batch whose importance ratio is taken per candidate (GSPO).

    Shapes:  Q candidates   P pairs of a candidate and a choice on its path
    """

    row: Int64[np.ndarray, " Q"]
    """Row of each candidate in the packed batch."""
    advantage: Float32[np.ndarray, " Q"]
    """Weighted advantage: the sum of weight times advantage over the tokens of the candidate."""
    length: Float32[np.ndarray, " Q"]
    """Number of tokens of the candidate, forced tokens included."""
    choice: Int64[np.ndarray, " P"]
    """Index of the choice in the batch; candidates that share a choice have one pair each."""
    candidate: Int64[np.ndarray, " P"]
    """Index of the candidate, 0 to Q - 1."""
