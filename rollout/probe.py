"""A probe: some prompts and answers that a holder of new weights scores before it searches.

A digest says that the right numbers arrived. It does not say that the model multiplies by them: an
engine may keep a packed copy of old weights, load them under other names, or sit on a device that
computes wrongly. So the learner tells with each version how likely it finds a few answers, and who
finds something else is no holder of that version.

Shapes:  B prompts
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float32, Int64

from orchard.errors import WeightMismatchError
from orchard.types import Prompts
from rollout.candidates import Candidates
from rollout.engine.protocol import DecodingBackend, SearchRunner
from rollout.search.add_target import score_leaf


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobProbe:
    """What a holder is asked, and what it must answer."""

    prompts: Prompts
    """Their ids are 0, 1, 2, ..."""
    leaf: Int64[np.ndarray, " B"]
    """The answer whose log-probability is compared, one per prompt."""
    score: Float32[np.ndarray, " B"]
    """Its log-probability as the learner has it, in nats."""
    tolerance: float
    """Largest difference of one answer, in nats."""


def verify(holder: SearchRunner, probe: LogprobProbe) -> float:
    """The largest difference between holder and learner, in nats.

    Raises:
        UnfitError: it is above the tolerance, or no number.
        EngineError: a prompt does not fit the engine.
    """
    found = holder.run(partial(_answer, leaf=probe.leaf), probe.prompts)
    apart = float(np.abs(found.score - probe.score).max(initial=0.0))
    if not apart <= probe.tolerance:
        raise WeightMismatchError(
            f"the answers to the probe are {apart:.2g} nats from the learner's where "
            f"{probe.tolerance:g} are allowed: the weights have the right digest and the model "
            "computes something else; try rollout.engine = torch, or raise cluster.probe_tolerance "
            "if the two only round differently"
        )
    return apart


def _answer(
    engine: DecodingBackend, prompts: Prompts, *, leaf: Int64[np.ndarray, " B"]
) -> Candidates:
    """A batch may be cut; the ids still say which answers are whose."""
    return score_leaf(engine, prompts, leaf[prompts.id])
