"""Random searches that keep their candidates apart: `beam_sample` and `dynamic`.

Independent draws repeat what is likely. A stochastic beam draws distinct leaves instead, without
replacement, at the cost of a beam of the same width; `dynamic` draws too many and keeps few copies.

Shapes:  B prompts   C candidates   K of them kept
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
from rollout.search.beam import beam, sample
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
    """`width` distinct leaves per prompt, drawn without replacement from the tempered policy.

    A beam search ranked by `GumbelNoise`; it forwards what a beam of that width forwards.
    Log-probabilities and scores are those of the policy itself, free of noise, and the candidates
    are in their order. A prompt gets fewer where the catalog has fewer leaves.

    Raises:
        EngineError: a prompt does not fit the engine, or the policy has diverged.
    """
    noise = GumbelNoise(prompts.id, temperature=temperature, seed=seed)
    found = beam(engine, prompts, width=width, noise=noise, allowed=allowed)
    order = np.lexsort((found.leaf, -found.score, ragged.owners(found.start)))
    return _pick(found, order, np.diff(found.start))


def dynamic(
    engine: DecodingBackend,
    prompts: Prompts,
    catalog: Catalog,
    *,
    count: int,
    temperature: float,
    seed: int,
) -> Candidates:
    """`count` of half as many draws again, chosen to hold the target and little twice.

    Every copy of the prompt's target is kept first; then one copy of each other leaf, those drawn
    most often first; then second copies in the same order, and so on. Equally frequent leaves go
    by score. This is ReRe's dynamic sampling (arXiv 2510.12211).

    Raises:
        EngineError: a prompt does not fit the engine, or the policy has diverged.
    """
    draws = -(-3 * count // 2)
    found = sample(engine, prompts, count=draws, temperature=temperature, seed=seed)
    prompt = ragged.owners(found.start)
    target = found.leaf == catalog.leaf_of_item[prompts.target][prompt]
    # Equal leaves of a prompt have equal scores, so a stable sort by leaf lines their copies up.
    order = np.lexsort((found.leaf, prompt))
    opens = np.ones(len(order), dtype=bool)
    opens[1:] = (np.diff(found.leaf[order]) != 0) | (np.diff(prompt[order]) != 0)
    first = np.append(np.flatnonzero(opens), len(order))
    copy, frequency = np.empty_like(order), np.empty_like(order)
    copy[order] = ragged.places(first)
    frequency[order] = np.diff(first)[ragged.owners(first)]
    copy[target] = 0
    order = np.lexsort((found.leaf, -found.score, -frequency, copy, ~target, prompt))
    kept = order[ragged.places(found.start) < count]
    kept = kept[np.lexsort((found.leaf[kept], -found.score[kept], prompt[kept]))]
    return _pick(found, kept, np.minimum(np.diff(found.start), count))


def _pick(
    found: Candidates, which: Int64[np.ndarray, " K"], count: Int64[np.ndarray, " B"]
) -> Candidates:
    """These candidates, which are grouped by prompt: `count[b]` of them for prompt b."""
    return replace(
        found,
        start=ragged.starts(count),
        node=found.node[which],
        logprob=found.logprob[which],
        score=found.score[which],
        leaf=found.leaf[which],
    )
