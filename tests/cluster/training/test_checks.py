"""Names in a configuration, and what the entries they name need of it."""

import re
from pathlib import Path

import pytest

from cluster.training.checks import REGISTRIES, check_names, check_widths, choices
from learner.advantage.estimators import ESTIMATORS
from orchard import config
from orchard.errors import ConfigError
from orchard.settings import Config
from orchard.testing import tiny_catalog
from rewards.registry import REWARDS
from rollout.search.registry import check_catalog
from tests.fixtures.registries import Borrow

ROOT = Path(__file__).parents[3]
LOGGED = ["rollout.search=logged", "learner.estimator=snips", "data.feedback=shown"]
TREE = {"name": "toy", "data": {"path": "somewhere"}}


def settings(*overrides: str) -> Config:
    return config.parse(TREE, overrides)


def value(setting: str, name: str) -> str:
    """Return a value of the setting that names one entry of its registry."""
    tables = {"rewards.weights": f"{{{name}=1.0}}", "guide.experts": f'["{name}"]'}
    return tables.get(setting, name)


@pytest.mark.parametrize("setting", sorted(choices()))
def test_a_setting_takes_every_registered_name_and_no_other(setting: str) -> None:
    for name in choices()[setting]:
        override = f"{setting}={value(setting, name)}"
        fitting = LOGGED if name in ("logged", "snips") else []
        check_names(settings("model.value_head=" + str(name == "ved").lower(), *fitting, override))
    override = f"{setting}={value(setting, 'nonsense')}"
    with pytest.raises(ConfigError, match=f"^{re.escape(setting)} names an unknown") as refused:
        check_names(settings(override))
    assert refused.value.code == "config.unknown_name"


@pytest.mark.parametrize(
    ("code", "overrides"),
    [
        *(
            ("group_of_one", [f"learner.estimator={name}", "rollout.group_size=1"])
            for name in ESTIMATORS
            if ESTIMATORS.facts(name).compares
        ),
        ("logged_draws", ["learner.estimator=snips"]),
        ("logged_draws", ["rollout.search=logged", "data.feedback=shown"]),
        ("logged_draws", [*LOGGED, "rewards.weights={utility=1.0}"]),
        ("logged_draws", [*LOGGED, "rewards.steps=utility"]),
        ("no_feedback", ["rollout.search=logged", "learner.estimator=snips"]),
        ("ratio_of_steps", ["learner.ratio=sequence", "learner.estimator=credit_to_go"]),
        ("head_by_requests", ["model.value_head=true", "rollout.decode=requests"]),
        (
            "head_by_requests",
            ["model.value_head=true", "rollout.decode=requests", "rollout.engine=torch",
             "evaluate.engine=vllm"],
        ),
        ("no_values", ["rollout.search=ved"]),
        ("no_values", ["rollout.search=ved", "rollout.ved.guide=head"]),
        ("outcome_without_weight", ["learner.value.outcome={transition=1.0}"]),
        ("ratio_of_steps", ["learner.ratio=sequence", "learner.estimator=sibling"]),
        ("ratio_of_steps", ["learner.ratio=sequence", "learner.estimator=group_sibling"]),
        ("ratio_of_steps", ["learner.ratio=sequence", "learner.estimator=sapo"]),
        ("dual_clip_of_other_loss", ["learner.loss=cispo", "learner.dual_clip=1.1"]),
        ("hints_of_other_search", ["rollout.search=dynamic", "rollout.hints=1"]),
        ("hints_beside_targets", ["rollout.add_target=true", "rollout.hints=1"]),
        ("anchor_without_thought", ["rollout.search=think", "learner.anchor=0.1"]),
        ("target_without_thought", ["rollout.search=think", "rollout.add_target=true"]),
        ("values_of_thoughts", ["rollout.search=think", "model.value_head=true"]),
        ("think_only_without_thoughts", ["learner.sapo.think_only=true"]),
        ("thoughts_of_varying_depth", ["rollout.search=think", "data.varying_depth=true"]),
        ("thoughts_of_varying_depth", ["evaluate.think=true", "data.titles=true"]),
        ("thoughts_of_varying_depth", ["data.rationales=why", "data.varying_depth=true"]),
        ("plugin_missing", ["plugins=['orchard_plugin_that_is_nowhere']"]),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_by_code(code: str, overrides: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        check_names(settings(*overrides))
    assert refused.value.code == f"config.{code}"


@pytest.mark.parametrize(
    "overrides",
    [
        ["rollout.search=ved", "rollout.ved.guide=critic"],
        ["rollout.search=ved", "rollout.ved.guide=head", "model.value_head=true"],
        ["rollout.search=ved", "model.value_head=true", "rollout.engine=vllm"],
        ["rollout.search=ved", "model.value_head=true", "rollout.engine=torch"],
        ["rollout.engine=torch", "model.value_head=true", "rollout.decode=requests"],
        ["learner.ratio=sequence", "learner.estimator=blend"],
        ["learner.loss=cispo", "learner.ratio=sequence", "learner.estimator=boundary"],
        ["rollout.hints=2", "learner.hint_weight=0.01", "learner.anchor=0.1"],
        ["learner.value.outcome={rule=1.0}"],
        [*LOGGED, "rollout.group_size=1", "learner.ratio=sequence"],
        ["rollout.search=think", "learner.sapo.think_only=true"],
    ],
)
def test_what_works_is_not_refused(overrides: list[str]) -> None:
    check_names(settings(*overrides))


@pytest.mark.parametrize("path", sorted((ROOT / "cluster" / "runs").glob("*.toml")), ids=str)
def test_shipped_run_files_name_what_there_is(path: Path) -> None:
    check_names(config.load(path))


def test_a_plugin_registers_what_a_run_may_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, borrow: Borrow
) -> None:
    borrow(REWARDS)
    (tmp_path / "fair_reward.py").write_text(
        "from rewards.registry import REWARDS\nfrom rewards.rule import rule\n\n\n"
        '@REWARDS.register("fair")\ndef fair(trees, known):\n    return rule(trees, known)\n'
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    check_names(settings("rewards.weights={fair=1.0}", "plugins=['fair_reward']"))
    assert "fair" in REWARDS


def test_no_setting_belongs_to_two_registries() -> None:
    claimed = [setting for registry in REGISTRIES for setting in registry.settings]
    assert len(claimed) == len(set(claimed))


def test_lists_of_widths_fit_the_levels_of_the_catalog(caplog: pytest.LogCaptureFixture) -> None:
    trie = tiny_catalog().trie
    assert trie.depth == 3
    for key, check in (
        ("evaluate.beams", lambda run: check_widths(run, trie)),
        ("rollout.width", lambda run: check_catalog(run.rollout, trie)),
    ):
        check(settings(f"{key}=[16,16,16]"))
        with pytest.raises(ConfigError, match=rf"{key} = \[16, 16\] has 2 numbers") as refused:
            check(settings(f"{key}=[16,16]"))
        assert refused.value.code == "config.widths_of_other_depth"
    check_widths(settings("evaluate.beams=[1,1,900]"), trie)
    assert "a beam of 900 is wider than the catalog" in caplog.text
