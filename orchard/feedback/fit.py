"""Fit the utilities of a run, on feedback or on training rows."""

import numpy as np
from jaxtyping import Float32

from orchard.catalog.catalog import Catalog
from orchard.data.prompts import Split
from orchard.errors import ConfigError
from orchard.feedback.clusters import make_clusters
from orchard.feedback.rows import Feedback
from orchard.feedback.utilities import Examples, PrefixUtilities, fit_utilities
from orchard.settings.rewards import UtilityConfig


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
    of_feedback = feedback is not None and settings.source != "train"
    examples = feedback.examples(catalog) if of_feedback else next_items(known, catalog)
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
        exhaustive=not of_feedback,
    )
    return fitted, of_feedback


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
