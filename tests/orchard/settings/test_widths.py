"""Beam widths as settings: one number, or one for each level."""

import tomllib

import pytest

from orchard import config
from orchard.errors import ConfigError
from orchard.settings import EvaluateConfig, RolloutConfig, ServeConfig
from orchard.settings.widths import at_least, at_most, last, of_levels, widest

RUN = {"name": "a", "data": {"path": "d"}}


def test_a_width_is_a_number_or_one_for_each_level() -> None:
    run = config.parse(RUN, ["serve.width=[16, 32, 64]", "evaluate.beams=[5,10,20]"])
    assert run.serve.width == (16, 32, 64)
    assert run.evaluate.beams == (5, 10, 20)
    assert config.parse(RUN).serve.width == 50
    assert RolloutConfig(group_size=8).beam_width == 8
    assert RolloutConfig(group_size=8, width=[4, 8, 16]).beam_width == (4, 8, 16)  # pyright: ignore[reportArgumentType]
    assert EvaluateConfig(beams=7).beams == 7
    again = config.parse(tomllib.loads(config.dump(run)))
    assert again.serve.width == (16, 32, 64)


@pytest.mark.parametrize("value", ["0", "-3", "[]", "[4, 0, 4]", "1.5", "true", "[4, 2.5]", '"x"'])
@pytest.mark.parametrize("key", ["serve.width", "evaluate.beams", "rollout.width"])
def test_anything_else_is_refused(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} = .*: a beam width is a whole number"):
        config.parse(RUN, [f"{key}={value}"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["serve.width=[8,1000]"], "serve.width = [8, 1000], max_width = 512"),
        (["rollout.width=[32,8]"], "rollout.width = [32, 8] ends below rollout.group_size = 16"),
        (["rollout.width=20", "rollout.search=sample"], "is of rollout.search = beam, not of"),
    ],
)
def test_widths_out_of_bounds_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config.parse(RUN, overrides)
    assert message in str(refused.value)


def test_a_list_has_one_number_for_each_level() -> None:
    assert of_levels(5, 3) == (5, 5, 5)
    assert of_levels((1, 2, 3), 3) == (1, 2, 3)
    message = r"serve.width = \[1, 2\] has 2 numbers, the semantic IDs have 3 levels"
    with pytest.raises(ConfigError, match=message):
        of_levels((1, 2), 3, "serve.width")


def test_widths_are_raised_and_capped_level_by_level() -> None:
    assert (widest((3, 9, 4)), last((3, 9, 4)), widest(6), last(6)) == (9, 4, 6, 6)
    assert at_least((3, 9, 4), 5) == (5, 9, 5)
    assert at_most((3, 9, 4), 5) == (3, 5, 4)
    assert (at_least(3, 5), at_most(3, 2)) == (5, 2)
    assert ServeConfig(width=[4, 8]).width == (4, 8)  # pyright: ignore[reportArgumentType]
