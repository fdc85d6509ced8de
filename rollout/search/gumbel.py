"""Gumbel noise that turns a beam search into sampling without replacement.

Shapes:  B prompts   F beams   M legal children of them
"""

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64, UInt64
from torch import Tensor

_LEAST_TEMPERATURE = 1e-200


class GumbelNoise:
    """Gumbel-perturbed log-probabilities that rank the beams of one search.

    The noise of children is conditioned on their maximum being the key of their parent, so that the
    leaves of a beam of width k have the k largest keys of all leaves: a sample without replacement
    from the policy (Kool, van Hoof and Welling, arXiv 1903.06059, algorithm 1). The noise of a node
    depends only on (seed, prompt id, node), not on the batch or the width, so that a wider beam
    contains every candidate of a narrower one.
    """

    def __init__(
        self, prompt_id: Int64[np.ndarray, " B"], *, temperature: float, seed: int
    ) -> None:
        """Start at the root of each prompt, with key 0."""
        # A log-probability divided by a smaller number overflows; the search is greedy long before.
        self._temperature = max(temperature, _LEAST_TEMPERATURE)
        self._prompt_id, self._seed = prompt_id, seed
        self._logprob: Float64[Tensor, " F"] = torch.zeros(len(prompt_id), dtype=torch.float64)
        self._key: Float64[Tensor, " F"] = torch.zeros_like(self._logprob)

    def keys(
        self,
        prompt: Int64[Tensor, " M"],
        source: Int64[Tensor, " M"],
        child: Int64[Tensor, " M"],
        gain: Float32[Tensor, " M"],
    ) -> Float64[Tensor, " M"]:
        """Compute the keys that rank the children of all beams.

        Args:
            prompt: prompt of each child, 0..B-1.
            source: beam that each child continues; ascending.
            child: trie node of each child.
            gain: log-probability of the code into the child, 0 for a forced code.
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
        """Continue with the children `best`, indices into the last result of `keys`."""
        self._logprob, self._key = self._logprob[best], self._key[best]

    def _gumbel(
        self, prompt: Int64[Tensor, " M"], child: Int64[Tensor, " M"]
    ) -> Float64[Tensor, " M"]:
        """Draw the Gumbel noise of each child from a hash of (seed, prompt id, node)."""
        state = _mixed(np.full(len(self._prompt_id), self._seed).astype(np.uint64))
        state = _mixed(state ^ self._prompt_id.astype(np.uint64))
        state = _mixed(state[prompt.cpu().numpy()] ^ child.cpu().numpy().astype(np.uint64))
        uniform = ((state >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        return torch.from_numpy(-np.log(-np.log(uniform))).to(child.device)


def _peaks(
    value: Float64[Tensor, " M"], owner: Int64[Tensor, " M"], num_owners: int
) -> Float64[Tensor, " F"]:
    """Return the largest value of each owner."""
    low = value.new_full((num_owners,), float("-inf"))
    return low.scatter_reduce(0, owner, value, "amax")


def _log1mexp(x: Float64[Tensor, " M"]) -> Float64[Tensor, " M"]:
    """Return log(1 - exp(x)) for x <= 0, accurate at both ends."""
    return torch.where(x > -0.7, (-x.expm1()).log(), (-x.exp()).log1p())


def _mixed(state: UInt64[np.ndarray, " M"]) -> UInt64[np.ndarray, " M"]:
    """Hash 64-bit states by one step of SplitMix64, so that neighboring states are unrelated."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
