"""Random searches with few or no duplicate candidates: `beam_sample` and `dynamic`.

Independent draws repeat likely leaves. A stochastic beam (`beam_sample`) draws distinct leaves,
without replacement, at the cost of a beam of the same width; `dynamic` draws more than needed and
drops duplicates first.

Shapes:  B prompts   C candidates   K kept candidates
"""

from dataclasses import replace

import numpy as np
from jaxtyping import Int64

from orchard import ragged
from orchard.catalog.catalog import Catalog
from orchard.types import Prompts
from rollout.candidates import Candidates
from rollout.engine.protocol import DecodingBackend
from rollout.item_filter import ItemFilter
from rollout.search.beam import beam
from rollout.search.draws import sample
from rollout.search.gumbel import GumbelNoise


def beam_sample(
    engine: DecodingBackend,
    prompts: Prompts,
    *,
    width: int,
    temperature: float,
    seed: int,
    allowed: ItemFilter | None = None,
) -> Candidates:
    """Draw `width` distinct leaves per prompt without replacement from the tempered policy.

    Runs a beam search ranked by `GumbelNoise`, at the cost of a beam of that width.
    Log-probabilities and scores are those of the policy itself, without noise, and candidates are
    sorted by score. A prompt gets fewer candidates if the catalog has fewer leaves.

    Raises:
        EngineError: a prompt does not fit the engine, or the policy has diverged.
    """
    noise = GumbelNoise(prompts.id, temperature=temperature, seed=seed)
    candidates = beam(engine, prompts, width=width, noise=noise, allowed=allowed)
    order = np.lexsort((candidates.leaf, -candidates.score, ragged.row_of(candidates.start)))
    return _pick(candidates, order, np.diff(candidates.start))


def dynamic(
    engine: DecodingBackend,
    prompts: Prompts,
    catalog: Catalog,
    *,
    count: int,
    temperature: float,
    seed: int,
) -> Candidates:
    """Draw 1.5 `count` leaves per prompt and keep `count`: the target and few duplicates.

    Every copy of the prompt's target is kept first; then one copy of each other leaf, those drawn
    most often first; then second copies in the same order, and so on. Equally frequent leaves are
    ordered by score. This is ReRe's dynamic sampling (arXiv 2510.12211).

    Raises:
        EngineError: a prompt does not fit the engine, or the policy has diverged.
    """
    draws = -(-3 * count // 2)
    candidates = sample(engine, prompts, count=draws, temperature=temperature, seed=seed)
    prompt = ragged.row_of(candidates.start)
    is_target = candidates.leaf == catalog.leaf_of_item[prompts.target][prompt]
    # Stable sort by prompt and leaf: the copies of a leaf form a run.
    order = np.lexsort((candidates.leaf, prompt))
    opens = np.ones(len(order), dtype=bool)
    opens[1:] = (np.diff(candidates.leaf[order]) != 0) | (np.diff(prompt[order]) != 0)
    run_start = np.append(np.flatnonzero(opens), len(order))
    # Number of each copy within its run, and the number of copies.
    copy, frequency = np.empty_like(order), np.empty_like(order)
    copy[order] = ragged.index_in_row(run_start)
    frequency[order] = np.diff(run_start)[ragged.row_of(run_start)]
    copy[is_target] = 0
    # Candidates of each prompt in the order of preference.
    order = np.lexsort((candidates.leaf, -candidates.score, -frequency, copy, ~is_target, prompt))
    kept = order[ragged.index_in_row(candidates.start) < count]
    kept = kept[np.lexsort((candidates.leaf[kept], -candidates.score[kept], prompt[kept]))]
    return _pick(candidates, kept, np.minimum(np.diff(candidates.start), count))


def _pick(
    candidates: Candidates, kept: Int64[np.ndarray, " K"], count: Int64[np.ndarray, " B"]
) -> Candidates:
    """Return the candidates `kept`, which are grouped by prompt, `count[b]` for prompt b."""
    return replace(
        candidates,
        start=ragged.starts(count),
        node=candidates.node[kept],
        logprob=candidates.logprob[kept],
        score=candidates.score[kept],
        leaf=candidates.leaf[kept],
    )
