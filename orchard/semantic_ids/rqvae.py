"""Quantize embeddings with a residual-quantized VAE (RQ-VAE, Lee et al. 2022, arXiv 2203.01941).

An encoder maps an embedding to a latent vector, each level's codebook quantizes the residual of
the levels before it, and a decoder reconstructs the embedding from the sum of the codebook vectors.
TIGER introduced semantic IDs made this way (Rajput et al. 2023, arXiv 2305.05065). The loss is the
squared error of the reconstruction, plus that of each codebook to its input, plus a fraction of
the reverse term, which commits the encoder to the codes; the gradient passes straight through the
quantization. Codebooks are initialized by k-means, and a code that no item of an epoch used is
reset to the residual of a random item.

Shapes:  I items   E dimensions   D latent dimensions   L levels   C codes of one level
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from torch.nn import functional

from orchard.semantic_ids.projection import Projection
from orchard.semantic_ids.quantize import Quantized, centroids, check_sizes, residual_codes

_WIDTHS = (256, 32)
"""Width of the hidden layer and of the latent vector."""
_COMMITMENT = 0.25
"""Weight of the commitment term relative to the codebook term."""
_BATCH = 1024
_UPDATES = 3000
_RATE = 1e-3


class LatentCodes(NamedTuple):
    """Codes of latent vectors, with the vectors and the input of each level."""

    codes: Int64[Tensor, "I L"]
    vectors: Float[Tensor, "L I D"]
    """Codebook vector of each code."""
    residuals: Float[Tensor, "L I D"]
    """Input of each level: the residual of the levels before it."""


class RqVae(nn.Module):
    """Encoder, codebooks and decoder of an RQ-VAE."""

    def __init__(self, dimensions: int, sizes: Sequence[int]) -> None:
        """Initialize the networks at random and codebooks of the given sizes with zeros."""
        super().__init__()
        hidden, code = _WIDTHS
        self.encoder = nn.Sequential(
            nn.Linear(dimensions, hidden), nn.ReLU(), nn.Linear(hidden, code)
        )
        self.decoder = nn.Sequential(
            nn.Linear(code, hidden), nn.ReLU(), nn.Linear(hidden, dimensions)
        )
        self.books = nn.ParameterList([nn.Parameter(torch.zeros(size, code)) for size in sizes])

    def quantize(self, vector: Float[Tensor, "I D"]) -> LatentCodes:
        """Select the nearest code of each level."""
        residual, codes, vectors, residuals = vector, list[Tensor](), list[Tensor](), list[Tensor]()
        for book in self.books:
            code = torch.cdist(residual.detach(), book.detach()).argmin(1)
            codes.append(code)
            vectors.append(book[code])
            residuals.append(residual)
            residual = residual - vectors[-1].detach()
        return LatentCodes(torch.stack(codes, 1), torch.stack(vectors), torch.stack(residuals))

    def loss(self, points: Float[Tensor, "I E"]) -> tuple[Float[Tensor, ""], Int64[Tensor, "I L"]]:
        """Compute the training loss and the codes of the points."""
        encoded = self.encoder(points)
        codes, vectors, residuals = self.quantize(encoded)
        straight_through = encoded + (vectors.sum(0) - encoded).detach()
        reconstruction = functional.mse_loss(self.decoder(straight_through), points)
        codebook = functional.mse_loss(vectors, residuals.detach())
        commitment = functional.mse_loss(residuals, vectors.detach())
        return reconstruction + len(vectors) * (codebook + _COMMITMENT * commitment), codes

    @torch.no_grad()
    def begin(self, points: Float[Tensor, "I E"], seed: int) -> None:
        """Initialize each codebook with the k-means centroids of its input."""
        residual: Tensor = self.encoder(points)
        for level, book in enumerate(self.books):
            fitted = centroids(residual.numpy(), len(book), seed + level)
            book.copy_(torch.from_numpy(fitted))
            residual = residual - book[torch.cdist(residual, book).argmin(1)]

    @torch.no_grad()
    def revive(self, used: Sequence[Tensor], points: Float[Tensor, "I E"]) -> None:
        """Reset the codes with a zero count in `used` to the residuals of random points."""
        residuals = self.quantize(self.encoder(points)).residuals
        for level, book in enumerate(self.books):
            unused = (used[level] == 0).nonzero().squeeze(1)[: len(points)]
            book[unused] = residuals[level, torch.randperm(len(points))[: len(unused)]]


def quantize_learned(
    embedding: Float32[np.ndarray, "I E"], sizes: Sequence[int], *, seed: int = 0
) -> Quantized:
    """Quantize embeddings to codes of `len(sizes)` levels by an RQ-VAE; equal seeds, equal codes.

    `error` is that of the embeddings reconstructed from the codes up to each level. `codebook` and
    `last` are in the latent space.

    Raises:
        DataError: there are fewer distinct embeddings than codes at a level.
    """
    check_sizes(embedding, sizes)
    mean = embedding.mean(axis=0)
    centered = embedding - mean
    scale = centered.std()
    points = torch.from_numpy(centered / scale)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _train(points, sizes, seed)
    books = tuple(book.detach().numpy() for book in model.books)
    linear = [layer for layer in model.encoder if isinstance(layer, nn.Linear)]
    projection = Projection(
        mean=mean,
        scale=float(scale),
        layers=tuple((layer.weight.numpy(), layer.bias.numpy()) for layer in linear),
    )
    codes, last = residual_codes(projection(embedding), books)
    with torch.no_grad():
        vectors = torch.stack([b[codes[:, level]] for level, b in enumerate(model.books)])
        partial_reconstructions = (model.decoder(partial_sum) for partial_sum in vectors.cumsum(0))
        error = [
            float(((reconstruction - points).double() ** 2).mean())
            for reconstruction in partial_reconstructions
        ]
    return Quantized(
        codes=codes,
        codebook=books,
        error=np.array(error) / float((points.double() ** 2).mean()),
        last=last,
        projection=projection,
    )


def _train(points: Float[Tensor, "I E"], sizes: Sequence[int], seed: int) -> RqVae:
    model = RqVae(points.shape[1], sizes)
    model.begin(points, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _UPDATES)
    pending, use_count = list[Tensor](), [torch.zeros(size) for size in sizes]
    for update in range(_UPDATES):
        if not pending:
            pending = list(torch.randperm(len(points)).split(_BATCH))
        batch = points[pending.pop()]
        loss, codes = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        for level, count in enumerate(use_count):
            count += torch.bincount(codes[:, level], minlength=len(count))
        # Not in the last half, where the learning rate is too low for a reset code to converge.
        if not pending and update < _UPDATES // 2:
            model.revive(use_count, batch)
            use_count = [torch.zeros(size) for size in sizes]
    return model.requires_grad_(False)
