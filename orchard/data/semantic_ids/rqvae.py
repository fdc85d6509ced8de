"""Residual quantisation of a learned code: RQ-VAE (Lee et al. 2022, arXiv 2203.01941).

An encoder maps an embedding to a small vector, levels of codebooks quantise what the levels before
left of it, and a decoder is to recover the embedding from their sum. Semantic IDs were first made
so (TIGER, Rajput et al. 2023, arXiv 2305.05065). The loss is the squared error of the recovered
embedding, that of each codebook to what it quantises, and a share of the opposite, which commits
the encoder to the codes; gradients pass through the quantisation as if it were not there. Codebooks
begin as k-means, and a code that no item of a whole epoch took begins anew at one of them.

Shapes:  I items   E dimensions   D dimensions of the code   L levels   C codes of one level
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from torch.nn import functional

from orchard.data.semantic_ids.quantize import Quantized, centroids, check_sizes

_WIDTHS = (256, 32)
"""Of the hidden layer and of the code."""
_COMMITMENT = 0.25
_BATCH = 1024
_UPDATES = 3000
_RATE = 1e-3


class RqVae(nn.Module):
    """Encoder, codebooks, decoder."""

    def __init__(self, dimensions: int, sizes: Sequence[int]) -> None:
        """Random networks, and codebooks of the given sizes that `begin` fills."""
        super().__init__()
        hidden, code = _WIDTHS
        self.encoder = nn.Sequential(
            nn.Linear(dimensions, hidden), nn.ReLU(), nn.Linear(hidden, code)
        )
        self.decoder = nn.Sequential(
            nn.Linear(code, hidden), nn.ReLU(), nn.Linear(hidden, dimensions)
        )
        self.books = nn.ParameterList([nn.Parameter(torch.zeros(size, code)) for size in sizes])

    def quantize(
        self, vector: Float[Tensor, "I D"]
    ) -> tuple[Int64[Tensor, "I L"], Float[Tensor, "L I D"], Float[Tensor, "L I D"]]:
        """The nearest code of each level, its vector, and what the level had to quantise."""
        rest, codes, taken, left = vector, list[Tensor](), list[Tensor](), list[Tensor]()
        for book in self.books:
            code = torch.cdist(rest.detach(), book.detach()).argmin(1)
            codes.append(code)
            taken.append(book[code])
            left.append(rest)
            rest = rest - taken[-1].detach()
        return torch.stack(codes, 1), torch.stack(taken), torch.stack(left)

    def loss(self, points: Float[Tensor, "I E"]) -> tuple[Float[Tensor, ""], Int64[Tensor, "I L"]]:
        """What is minimised, and the codes that the points take."""
        vector = self.encoder(points)
        codes, taken, left = self.quantize(vector)
        straight = vector + (taken.sum(0) - vector).detach()
        recovered = functional.mse_loss(self.decoder(straight), points)
        books = functional.mse_loss(taken, left.detach())
        commitment = functional.mse_loss(left, taken.detach())
        return recovered + len(taken) * (books + _COMMITMENT * commitment), codes

    @torch.no_grad()
    def begin(self, points: Float[Tensor, "I E"], seed: int) -> None:
        """Fill each codebook with the centroids of what it has to quantise."""
        rest: Tensor = self.encoder(points)
        for level, book in enumerate(self.books):
            made = centroids(rest.numpy(), len(book), seed + level)
            book.copy_(torch.from_numpy(made))
            rest = rest - book[torch.cdist(rest, book).argmin(1)]

    @torch.no_grad()
    def revive(self, used: Sequence[Tensor], points: Float[Tensor, "I E"]) -> None:
        """Codes that were not `used` start again at what some of the points left to their level."""
        left = self.quantize(self.encoder(points))[2]
        for level, book in enumerate(self.books):
            idle = (used[level] == 0).nonzero().squeeze(1)[: len(points)]
            book[idle] = left[level, torch.randperm(len(points))[: len(idle)]]


def quantize_learned(
    embedding: Float32[np.ndarray, "I E"], sizes: Sequence[int], *, seed: int = 0
) -> Quantized:
    """Codes of `len(sizes)` levels by an RQ-VAE; equal seeds give equal codes.

    `error` is of the embeddings recovered from the codes up to each level. Codebooks and what is
    left to them are in the space of the learned code.

    Raises:
        DataError: fewer distinct items than codes at a level.
    """
    check_sizes(embedding, sizes)
    rest = embedding - embedding.mean(axis=0)
    points = torch.from_numpy(rest / rest.std())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = _train(points, sizes, seed)
    with torch.no_grad():
        codes, taken, left = made.quantize(made.encoder(points))
        parts = (made.decoder(one) for one in taken.cumsum(0))
        error = [float(((part - points).double() ** 2).mean()) for part in parts]
    return Quantized(
        codes=codes.numpy(),
        codebook=tuple(book.detach().numpy() for book in made.books),
        error=np.array(error) / float((points.double() ** 2).mean()),
        last=left[-1].numpy(),
    )


def _train(points: Float[Tensor, "I E"], sizes: Sequence[int], seed: int) -> RqVae:
    made = RqVae(points.shape[1], sizes)
    made.begin(points, seed)
    optimizer = torch.optim.AdamW(made.parameters(), lr=_RATE, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _UPDATES)
    batches, used = list[Tensor](), [torch.zeros(size) for size in sizes]
    for update in range(_UPDATES):
        if not batches:
            batches = list(torch.randperm(len(points)).split(_BATCH))
        batch = points[batches.pop()]
        loss, codes = made.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        for level, count in enumerate(used):
            count += torch.bincount(codes[:, level], minlength=len(count))
        # Not in the last half, where the rate is too low for a code to find its place.
        if not batches and update < _UPDATES // 2:
            made.revive(used, batch)
            used = [torch.zeros(size) for size in sizes]
    return made.requires_grad_(False)
