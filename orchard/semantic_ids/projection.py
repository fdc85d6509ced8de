"""Map embeddings into the space of the codebooks, with numbers that no batch size changes.

Shapes:  I items   E dimensions of an embedding   D dimensions of the codebooks
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

_WEIGHT, _BIAS = "encoder.{}.weight", "encoder.{}.bias"


@dataclass(frozen=True, kw_only=True, eq=False)
class Projection:
    """Centering of embeddings and, for an RQ-VAE, the scaling and the encoder behind it."""

    mean: Float32[np.ndarray, " E"]
    scale: float = 1.0
    """Divisor of the centered embeddings."""
    layers: tuple[tuple[Float32[np.ndarray, "_ _"], Float32[np.ndarray, " _"]], ...] = ()
    """Weight (outputs, inputs) and bias of each linear layer; ReLU between them."""

    def __call__(self, embedding: Float32[np.ndarray, "I E"]) -> Float32[np.ndarray, "I D"]:
        """Project embeddings; a row's result does not depend on the rows beside it."""
        centered = embedding - self.mean
        if not self.layers:
            return centered
        # Sums of products depend on the shape of the matrix in their last bits. In float64 these
        # lie below the rounding to float32.
        hidden = (centered / np.float32(self.scale)).astype(np.float64)
        for number, (weight, bias) in enumerate(self.layers):
            if number:
                hidden = np.maximum(hidden, 0)
            hidden = hidden @ weight.T.astype(np.float64) + bias
        return hidden.astype(np.float32)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the content as named arrays."""
        found: dict[str, np.ndarray] = {
            "mean": self.mean,
            "scale": np.array([self.scale], dtype=np.float32),
        }
        for number, (weight, bias) in enumerate(self.layers):
            found[_WEIGHT.format(number)], found[_BIAS.format(number)] = weight, bias
        return found

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Projection":
        """Restore a projection from `arrays`; raises KeyError where one is missing."""
        count = sum(name.startswith("encoder.") for name in arrays) // 2
        layers = [(arrays[_WEIGHT.format(n)], arrays[_BIAS.format(n)]) for n in range(count)]
        return cls(mean=arrays["mean"], scale=float(arrays["scale"][0]), layers=tuple(layers))
