"""Score what was shown, instead of a search: the trees of one path that learn from a log.

The candidate of a prompt is its target, an item that an endpoint drew and showed, with the
log-probabilities of the current policy. With `Prompts.logged`, the log-probability with which it
was shown, they give its importance weight (`learner.advantage.logged`).

Shapes:  B prompts
"""

from orchard.catalog.catalog import Catalog
from orchard.types import Prompts
from rollout.candidates import Candidates
from rollout.engine.protocol import DecodingBackend
from rollout.search.add_target import score_leaf


def logged(engine: DecodingBackend, prompts: Prompts, catalog: Catalog) -> Candidates:
    """Return the target of each prompt as its only candidate.

    Raises:
        EngineError: a prompt does not fit the engine, or the policy has diverged.
    """
    return score_leaf(engine, prompts, catalog.leaf_of_item[prompts.target])
