"""Fit the utilities of a run, on feedback or on training rows, and count feedback as rows.

Shapes:  I items   E width of an embedding   R rows
"""

from dataclasses import replace

import numpy as np
from jaxtyping import Float32, Float64

from orchard.catalog.catalog import Catalog
from orchard.data.fresh import concatenate
from orchard.data.prompts import Split
from orchard.errors import ConfigError
from orchard.feedback.clusters import make_clusters
from orchard.feedback.rows import Feedback
from orchard.feedback.utilities import Examples, PrefixUtilities, fit_utilities
from orchard.settings.rewards import UtilityConfig

_DAY = 86_400.0
"""Seconds of a day."""


def utilities_of(
    settings: UtilityConfig,
    catalog: Catalog,
    known: Split,
    feedback: Feedback | None,
    embedding: Float32[np.ndarray, "I E"] | None = None,
) -> tuple[PrefixUtilities, bool]:
    """Fit utilities, and return them with whether they are of feedback.

    Args:
        settings: settings of the utilities.
        catalog: catalog of the rows.
        known: training rows, whose targets have reward 1, or what the rows say.
        feedback: feedback of the run; None if there is none.
        embedding: embedding of each item, for clusters of histories.

    Raises:
        ConfigError: the settings ask for feedback or embeddings that are missing.
        DataError: nothing has a weight.
    """
    if settings.source == "feedback" and feedback is None:
        raise ConfigError(
            'rewards.utility.source = "feedback" needs feedback; set data.feedback to folders that '
            "`orchard data feedback` has made, or choose another source",
            code="config.no_feedback",
        )
    shown = None if settings.source == "train" else feedback
    examples = next_items(known, catalog) if shown is None else shown.examples(catalog)
    clusters = make_clusters(
        settings.clusters,
        catalog,
        history=examples.history,
        start=examples.start,
        embedding=embedding,
        groups=settings.groups,
    )
    fitted = fit_utilities(
        catalog.trie,
        examples,
        clusters,
        prior=settings.prior,
        backoff=settings.backoff,
        exhaustive=shown is None,
    )
    return fitted, shown is not None


def with_feedback(rows: Split, feedback: Feedback, *, half_life: float) -> Split:
    """Return rows followed by the requests of feedback, with weights that decay with their age.

    Args:
        rows: training rows, which keep their weights.
        feedback: feedback; requests without a reward above 0 have nothing to count.
        half_life: days before the newest request after which one weighs half; 0 for no decay.
    """
    requests, age = feedback.requests, feedback.time.max() - feedback.time
    decay = 0.5 ** (age / (half_life * _DAY)) if half_life else np.ones(len(age))
    weight = decay if requests.weight is None else requests.weight * decay
    return concatenate(rows, replace(requests, weight=weight))


def counted_weights(rows: Split) -> Float64[np.ndarray, " R"] | None:
    """Return the weight of each row as an example of what is wanted; None if all are 1.

    It is the reward of the target where that is positive, times the weight of the row.
    """
    if rows.reward is None:
        return rows.weight
    wanted = np.maximum(rows.reward, 0.0)
    return wanted if rows.weight is None else wanted * rows.weight


def next_items(rows: Split, catalog: Catalog) -> Examples:
    """Return rows as requests that were shown their target."""
    leaf_of_item = catalog.leaf_of_item.astype(np.int64)
    target, ones = leaf_of_item[rows.target], np.ones(len(rows))
    return Examples(
        history=leaf_of_item[rows.history],
        start=rows.history_start,
        target=target,
        row_start=np.arange(len(rows) + 1),
        leaf=target,
        reward=ones if rows.reward is None else rows.reward,
        weight=ones if rows.weight is None else rows.weight,
    )
