"""Gumbel noise that turns a beam search into draws without replacement.

Shapes:  B prompts   F beams   M legal children of them
"""

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64, UInt64
from torch import Tensor


class GumbelNoise:
    """Ranks the beams of one search by log-probabilities with Gumbel noise.

    The noise of a child is conditioned on the largest among siblings being that of their parent, so
    that the leaves of a beam of width k are the k largest of all leaves: draws without replacement
    from the policy (Kool, van Hoof and Welling, arXiv 1903.06059, algorithm 1). The noise of a node
    comes from (seed, prompt id, node) and nothing else: neither the batch nor the width matters,
    and a wider beam holds every candidate of a narrower one.
    """

    def __init__(
        self, prompt_id: Int64[np.ndarray, " B"], *, temperature: float, seed: int
    ) -> None:
        """Begin at the root of each prompt."""
        self._prompt_id, self._temperature, self._seed = prompt_id, temperature, seed
        self._logprob: Float64[Tensor, " F"] = torch.zeros(len(prompt_id), dtype=torch.float64)
        self._key: Float64[Tensor, " F"] = torch.zeros_like(self._logprob)

    def keys(
        self,
        prompt: Int64[Tensor, " M"],
        source: Int64[Tensor, " M"],
        child: Int64[Tensor, " M"],
        gain: Float32[Tensor, " M"],
    ) -> Float64[Tensor, " M"]:
        """What to rank the children by.

        Args:
            prompt: of each child, 0..B-1.
            source: beam that each child continues; ascending.
            child: trie node.
            gain: log-probability of the code into it, 0 where it is forced.
        """
        above_logprob, above_key = self._logprob.to(gain.device), self._key.to(gain.device)
        scaled = gain.double() / self._temperature
        num_beams = len(above_key)
        peak = _peaks(scaled, source, num_beams)
        total = torch.zeros_like(above_key)
        total.index_add_(0, source, (scaled - peak[source]).exp())
        self._logprob = above_logprob[source] + scaled - (peak + total.log())[source]
        noisy = self._logprob + self._gumbel(prompt, child)
        below = noisy - _peaks(noisy, source, num_beams)[source]
        # Stable form of -log(exp(-key above) - exp(-peak) + exp(-noisy)), the paper's appendix B.3.
        excess = above_key[source] - noisy + _log1mexp(below)
        self._key = above_key[source] - excess.clamp(min=0) - (-excess.abs()).exp().log1p()
        return self._key

    def keep(self, best: Int64[Tensor, " F"]) -> None:
        """Go on with these of the children that were ranked last."""
        self._logprob, self._key = self._logprob[best], self._key[best]

    def _gumbel(
        self, prompt: Int64[Tensor, " M"], child: Int64[Tensor, " M"]
    ) -> Float64[Tensor, " M"]:
        state = _mixed(np.full(len(self._prompt_id), self._seed).astype(np.uint64))
        state = _mixed(state ^ self._prompt_id.astype(np.uint64))
        state = _mixed(state[prompt.cpu().numpy()] ^ child.cpu().numpy().astype(np.uint64))
        uniform = ((state >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        return torch.from_numpy(-np.log(-np.log(uniform))).to(child.device)


def _peaks(
    value: Float64[Tensor, " M"], owner: Int64[Tensor, " M"], num_owners: int
) -> Float64[Tensor, " F"]:
    """Largest value of each owner."""
    low = value.new_full((num_owners,), float("-inf"))
    return low.scatter_reduce(0, owner, value, "amax")


def _log1mexp(x: Float64[Tensor, " M"]) -> Float64[Tensor, " M"]:
    """log(1 - exp(x)) for x <= 0, accurate at both ends."""
    return torch.where(x > -0.7, (-x.expm1()).log(), (-x.exp()).log1p())


def _mixed(state: UInt64[np.ndarray, " M"]) -> UInt64[np.ndarray, " M"]:
    """One step of SplitMix64: neighbouring states become unrelated 64-bit numbers."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
