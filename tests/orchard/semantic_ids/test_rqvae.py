"""The learned quantizer."""

import numpy as np
import pytest
import torch

from orchard.errors import DataError
from orchard.semantic_ids import rqvae
from orchard.semantic_ids.quantize import distances
from tests.fixtures.points import blobs


@pytest.mark.slow
def test_a_learned_quantiser_recovers_the_scales_of_the_data_and_repeats_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rqvae, "_UPDATES", 100)
    points, before = blobs(), torch.random.get_rng_state()
    found = rqvae.quantize_learned(points, (4, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    pairs = np.unique(np.stack([found.codes[:, 0], np.repeat(np.arange(4), 40)]), axis=1)
    assert pairs.shape[1] == 4  # one to one
    assert 1 > found.error[0] > found.error[1] > 0
    near = distances(found.last, found.codebook[-1]).argmin(1)
    assert (near == found.codes[:, -1]).all()
    again, other = (rqvae.quantize_learned(points, (4, 4), seed=seed) for seed in (0, 1))
    assert (again.codes == found.codes).all()
    assert (again.codebook[0] == found.codebook[0]).all()
    assert (other.codebook[0] != found.codebook[0]).any()
    with pytest.raises(DataError, match="lower --levels"):
        rqvae.quantize_learned(points[:3], (4, 4))


def test_gradients_pass_through_the_quantisation_and_idle_codes_begin_anew() -> None:
    torch.manual_seed(0)
    points = torch.from_numpy(blobs())
    made = rqvae.RqVae(8, (4, 6))
    made.begin(points, seed=0)
    vector = made.encoder(points)
    codes, taken, left = made.quantize(vector)
    assert (left[0] == vector).all()
    torch.testing.assert_close(left[1], vector - taken[0])
    loss, seen = made.loss(points)
    loss.backward()
    assert (seen == codes).all()
    for parameter in made.parameters():
        assert parameter.grad is not None
        assert float(parameter.grad.abs().sum()) > 0
    with torch.no_grad():
        made.books[1][5] = 1e6  # out of reach
    used = [torch.bincount(level, minlength=6) for level in made.quantize(vector)[0].T]
    assert used[1][5] == 0
    made.revive([used[0][:4], used[1]], points)
    assert float(made.books[1][5].detach().abs().max()) < 1e3
