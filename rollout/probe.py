"""Log-probability probe: verify that an engine computes what the learner computes.

A digest shows that the right numbers arrived, not that the model multiplies by them: an engine may
keep a packed copy of old weights, load them under other names, or run on a device that computes
wrong results. So the learner publishes with each version the log-probabilities of a few leaves, and
an engine that computes others after loading the weights does not search.

Shapes:  B prompts
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float32, Int64

from orchard.errors import WeightMismatchError
from orchard.settings import Config
from orchard.types import Prompts
from rollout.candidates import Candidates
from rollout.engine.protocol import DecodingBackend, SearchRunner
from rollout.search.add_target import score_leaf

EXACT, ROUNDED = 1e-3, 0.5
"""Tolerance in nats between search and learner in float32 and in bfloat16; docs/operations.md."""


def probe_tolerance(config: Config) -> float:
    """Return the tolerance in nats between log-probabilities of the search and of the learner."""
    formats = {config.rollout.dtype, config.learner.dtype, config.cluster.publish_format}
    exact = "bfloat16" not in formats
    return config.cluster.probe_tolerance or (EXACT if exact else ROUNDED)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobProbe:
    """Prompts, one leaf each, and the learner's log-probabilities of these leaves."""

    prompts: Prompts
    """Prompts with the ids 0, 1, 2, ..."""
    leaf: Int64[np.ndarray, " B"]
    """Leaf whose log-probability is compared, one per prompt."""
    score: Float32[np.ndarray, " B"]
    """Learner's log-probability of the leaf, in nats."""
    tolerance: float
    """Largest allowed difference of one log-probability, in nats."""


def verify(engine: SearchRunner, probe: LogprobProbe) -> float:
    """Return the largest difference between the engine's and the learner's scores, in nats.

    Raises:
        WeightMismatchError: the difference is above the tolerance, or not a number.
        EngineError: a prompt does not fit the engine.
    """
    scored = engine.run(partial(_score_probe, leaf=probe.leaf), probe.prompts)
    difference = float(np.abs(scored.score - probe.score).max(initial=0.0))
    if not difference <= probe.tolerance:
        raise WeightMismatchError(
            f"the answers to the probe are {difference:.2g} nats from the learner's where "
            f"{probe.tolerance:g} are allowed: the weights have the right digest, but the "
            "model computes different numbers; try rollout.engine = torch, or raise "
            "cluster.probe_tolerance if the two only round differently"
        )
    return difference


def _score_probe(
    engine: DecodingBackend, prompts: Prompts, *, leaf: Int64[np.ndarray, " B"]
) -> Candidates:
    """Score the probe's leaf of each prompt; the ids select the leaves if the batch was split."""
    return score_leaf(engine, prompts, leaf[prompts.id])
