"""What a batch may hold beside its choices: states for the value head, candidates as wholes."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32, Int64


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueTargets:
    """Non-empty prefixes of a batch's candidates, and what the value head is to make of them.

    Weights are shares of all states of all candidates of the whole batch.

    Shapes:  V states   P states of the longest path, the prompt's end included
    """

    row: Int64[np.ndarray, " V"]
    path: Int32[np.ndarray, "V P"]
    """Slots of the prompt's end and of the last token of each node down to the state, then -1."""
    reward: Float32[np.ndarray, " V"]
    """Of the step into the state."""
    outcome: Float32[np.ndarray, " V"]
    """Mean discounted reward from the state on, over the candidates through it."""
    through: Float32[np.ndarray, " V"]
    """Weight of the candidates through the state."""
    entered: Float32[np.ndarray, " V"]
    """Of those that came from another state: as `through`, but 0 after the prompt's end."""
    ending: Float32[np.ndarray, " V"]
    """Of those that end there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceTargets:
    """The candidates of a batch, where the ratio is that of a whole candidate (GSPO).

    Shapes:  Q candidates   P pairs of a candidate and a choice on its path
    """

    row: Int64[np.ndarray, " Q"]
    advantage: Float32[np.ndarray, " Q"]
    """Weighted: the sum of weight times advantage over the candidate's tokens."""
    length: Float32[np.ndarray, " Q"]
    """Its tokens, forced ones included."""
    choice: Int64[np.ndarray, " P"]
    """Index into the choices of the batch; candidates that share a choice each name it."""
    candidate: Int64[np.ndarray, " P"]
