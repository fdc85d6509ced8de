"""Optional training targets of a batch: states for the value head, candidates, target codes."""

from dataclasses import dataclass
from typing import Generic

import numpy as np
from jaxtyping import Float32, Int
from typing_extensions import TypeVar

A = TypeVar("A", default=np.ndarray)
"""Type of the arrays of a batch: NumPy arrays by default, or tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueTargets(Generic[A]):
    """Non-empty prefixes of a batch's candidates and the value targets of these states.

    Weights are shares of all states of all candidates of the whole batch.

    Shapes:  V states   P states of the longest path, the prompt's end included
    """

    row: Int[A, " V"]
    """Row of each state in the packed batch."""
    path: Int[A, "V P"]
    """Slots of the last prompt token and of the last token of each node down to the state, then
    -1."""
    reward: Float32[A, " V"]
    """Reward of the step into the state."""
    outcome: Float32[A, " V"]
    """Mean discounted return from the state on, over the candidates that pass through it."""
    through: Float32[A, " V"]
    """Weight of the candidates that pass through the state."""
    entered: Float32[A, " V"]
    """Weight of the candidates that enter from another state: `through`, but 0 at the prompt's
    end."""
    ending: Float32[A, " V"]
    """Weight of the candidates that end in the state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceTargets(Generic[A]):
    """Candidates of a batch whose importance ratio is taken per candidate (GSPO).

    Shapes:  Q candidates   P pairs of a candidate and a choice on its path
    """

    row: Int[A, " Q"]
    """Row of each candidate in the packed batch."""
    advantage: Float32[A, " Q"]
    """Weighted advantage: the sum of weight times advantage over the tokens of the candidate."""
    length: Float32[A, " Q"]
    """Number of tokens of the candidate, forced tokens included."""
    choice: Int[A, " P"]
    """Index of the choice in the batch; candidates that share a choice have one pair each."""
    candidate: Int[A, " P"]
    """Index of the candidate, 0 to Q - 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeTargets(Generic[A]):
    """Codes of targets that the policy learns by cross entropy, beside the loss of its choices.

    Fields are those of the choices of a batch.

    Shapes:  Z codes
    """

    row: Int[A, " Z"]
    """Row of each code in the packed batch."""
    query_slot: Int[A, " Z"]
    """Slot whose output predicts the code."""
    state: Int[A, " Z"]
    """Trie node before the code."""
    chosen: Int[A, " Z"]
    """Trie node after the code."""
    weight: Float32[A, " Z"]
    """Weight of the negative log-probability of the code in the loss of the whole batch."""
