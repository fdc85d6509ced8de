"""Click models: closed forms against enumeration and against draws."""

from itertools import product

import numpy as np
import pytest

from orchard.errors import ConfigError
from orchard.simulation.click_models import ClickModel, click_model

MODELS = [
    click_model("position", eta=0.7),
    click_model("cascade", after_click=0.4, after_skip=0.9),
    click_model("satiation", eta=0.5, fade=0.3),
]


def lists() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    attraction = rng.random((6, 4))
    attraction[1, 2:] = 0  # a shorter list
    return attraction, rng.integers(0, 2, (6, 4))


@pytest.mark.parametrize("model", MODELS, ids=lambda m: type(m).__name__)
def test_click_probabilities_are_what_draws_average_to(model: ClickModel) -> None:
    attraction, group = lists()
    num, rng = 5_000, np.random.default_rng(2)
    total = np.zeros_like(attraction)
    for row in range(len(attraction)):
        tiled = np.tile(attraction[row], (num, 1)), np.tile(group[row], (num, 1))
        look, like = rng.random((2, num, 4))
        total[row] = model.clicks(*tiled, look, like).mean(axis=0)
    # Five standard errors of a share, of 24 shares at most.
    assert np.abs(total - model.probability(attraction, group)).max() < 5 * 0.5 / np.sqrt(num)


def test_satiation_follows_every_combination_of_clicks() -> None:
    attraction, group = lists()
    fade, looked_at = 0.3, (1.0 + np.arange(4)) ** -0.5
    expected = np.zeros(4)
    for clicks in product((0, 1), repeat=4):
        chance = 1.0
        for rank, clicked in enumerate(clicks):
            earlier = sum(clicks[k] for k in range(rank) if group[3, k] == group[3, rank])
            p = looked_at[rank] * attraction[3, rank] * fade**earlier
            chance *= p if clicked else 1 - p
        expected += chance * np.array(clicks)
    found = MODELS[2].probability(attraction, group)[3]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_plain_cascade_clicks_once() -> None:
    attraction, group = lists()
    look, like = np.random.default_rng(3).random((2, 6, 4))
    clicked = click_model("cascade").clicks(attraction, group, look, like)
    assert clicked.sum(axis=1).max() == 1
    probability = click_model("cascade").probability(attraction, group)
    np.testing.assert_allclose(probability.sum(axis=1), 1 - (1 - attraction).prod(axis=1))


def test_unknown_names_and_constants_are_refused() -> None:
    with pytest.raises(ConfigError, match="choose from cascade, position, satiation"):
        click_model("random")
    with pytest.raises(ConfigError, match="no constant 'fade'; it has eta"):
        click_model("position", fade=0.5)
    with pytest.raises(ConfigError, match="after_skip = 1.5"):
        click_model("cascade", after_skip=1.5)
