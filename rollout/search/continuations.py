"""Continuations of the beams of a search, with and without forward pass.

Shapes:  F beams of all prompts   F1 = F + 1   M children of them
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from orchard.catalog.trie import Trie
from rollout.engine.protocol import NextCodeLogprobs
from rollout.search.topk import row_starts


class Continuations(NamedTuple):
    """Continuations of all beams, grouped by beam."""

    source: Int64[Tensor, " M"]
    """Beam that each child continues."""
    node: Int64[Tensor, " M"]
    """Trie node of each child."""
    gain: Float32[Tensor, " M"]
    """Log-probability that each child adds to the score."""
    start: Int64[Tensor, " F1"]
    """Boundaries: the children of beam f are `start[f] : start[f + 1]`."""


def continuations(
    trie: Trie,
    node: Int64[Tensor, " F"],
    fanout: Int64[Tensor, " F"],
    scored: Bool[Tensor, " F"],
    expansion: NextCodeLogprobs | None,
) -> Continuations:
    """Return the continuations of each beam.

    Beams that are `scored` have the expansion's children. The others either stay at their leaf or
    follow their only child, with gain 0.
    """
    if expansion is not None and bool(scored.all()):
        children = expansion.children
        return Continuations(children.owner, children.node, expansion.logprob, children.start)
    # First child of each beam, or the leaf itself.
    below = torch.where(fanout > 0, trie.first_child(node), node)
    start = row_starts(fanout.clamp(min=1))
    source = torch.repeat_interleave(start.diff())
    child = torch.arange(len(source), device=node.device) + (below - start[:-1])[source]
    gain = torch.zeros_like(source, dtype=torch.float32)
    if expansion is not None:
        gain[scored[source]] = expansion.logprob
    return Continuations(source, child, gain, start)
