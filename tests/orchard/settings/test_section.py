"""Keys and values of earlier versions, wherever settings come from."""

import logging

import pytest

from orchard import config
from orchard.errors import ConfigError
from orchard.settings import Config, ServeConfig, section
from orchard.settings.section import current_key

OLD = {
    "rollout.candidates": 6,
    "learner.truncate": 2.0,
    "learner.average": 0.5,
    "sft.average": 0.25,
    "cluster.max_lag": 2,
    "rewards.ranking": "published",
    "learner.estimator": "step",
    "learner.step.format_weight": 0.5,
}


def run(**sections: object) -> Config:
    return config.parse({"name": "old", "data": {"path": "data"}, **sections})


def test_old_keys_and_values_of_a_file_mean_what_the_new_ones_mean() -> None:
    tree = {"data": {"path": "data"}, "name": "old"}
    new = dict(tree)
    for key, value in OLD.items():
        config._set(tree, f"{key}={value!r}")  # pyright: ignore
    settings = config.parse(tree)
    assert settings.rollout.group_size == 6
    assert (settings.learner.tis_clip, settings.learner.ema_decay) == (2.0, 0.5)
    assert settings.sft.ema_decay == 0.25
    assert settings.cluster.max_off_policy_steps == 2
    assert settings.rewards.ranking_variant == "paper"
    assert (settings.learner.estimator, settings.learner.sapo.format_weight) == ("sapo", 0.5)
    assert config.parse(new, [f"{k}={v}" for k, v in OLD.items()]) == settings


def test_an_old_key_is_announced_under_its_new_name(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(section, "_warned", set[str]())  # another test may have used the key
    with caplog.at_level(logging.WARNING, logger="orchard"):
        assert ServeConfig.model_validate({"salt": "a", "linger_ms": 3}).ab_salt == "a"
    assert "serve.salt is now serve.ab_salt; the old name still works" in caplog.text


def test_an_old_key_beside_its_new_one_is_refused() -> None:
    with pytest.raises(ConfigError) as refused:
        run(rollout={"candidates": 4, "group_size": 4})
    assert refused.value.code == "config.renamed_key_twice"
    assert "candidates is now group_size, and both are set" in str(refused.value)


def test_unknown_keys_stay_as_they_are() -> None:
    assert current_key(Config, "rollout.ved.nothing") == "rollout.ved.nothing"
