"""A registry of its own, and names of a configuration checked against it."""

from pathlib import Path

import pytest

from orchard import config
from orchard.errors import ConfigError
from orchard.registry import Facts, Registry, import_plugins, names_in
from orchard.settings import Config

TREE = {"name": "toy", "data": {"path": "somewhere"}}


def settings(*overrides: str) -> Config:
    return config.parse(TREE, overrides)


def small(asked: list[str]) -> Registry[type, Facts]:
    """Searches `beam`, and `wide` that notes what it is asked about."""

    def rule(given: Config) -> None:
        asked.append(given.rollout.search)

    searches: Registry[type, Facts] = Registry("search", ("rollout.search",), Facts())
    searches.register("beam")(int)
    searches.register("wide", Facts(rules=(rule,)))(float)
    return searches


def test_an_entry_is_a_function_and_its_facts() -> None:
    searches = small([])
    assert dict(searches) == {"beam": int, "wide": float}
    assert searches.facts("beam").rules == ()
    with pytest.raises(KeyError):
        searches["narrow"]


def test_only_the_rules_of_the_named_entry_are_asked() -> None:
    asked: list[str] = []
    searches = small(asked)
    searches.check(settings())
    assert asked == []
    searches.check(settings("rollout.search=wide"))
    assert asked == ["wide"]


@pytest.mark.parametrize(
    ("name", "hint"), [("bean", "did you mean beam?"), ("q", "choose from beam, wide")]
)
def test_an_unknown_name_is_answered_with_known_ones(name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as refused:
        small([]).check(settings(f"rollout.search={name}"))
    assert refused.value.code == "config.unknown_name"
    assert str(refused.value) == f"rollout.search names an unknown search {name}; {hint}"


def test_a_name_belongs_to_one_function() -> None:
    searches = small([])
    searches.register("beam")(int)  # a module that is imported again
    with pytest.raises(ConfigError) as refused:
        searches.register("beam")(str)
    assert refused.value.code == "config.name_taken"
    assert searches["beam"] is int


def test_names_are_values_or_keys_of_a_setting() -> None:
    given = settings("rewards.weights={rule=1.0,prefix=0.5}")
    assert names_in(given, "rollout.search") == ("beam",)
    assert names_in(given, "rewards.weights") == ("rule", "prefix")
    assert names_in(given, "cluster.tracker") == ()


def test_plugins_are_modules_of_the_working_directory_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "orchard_plugin_of_a_test.py").write_text("import sys\nsys.plugged = __name__\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    monkeypatch.setattr("sys.plugged", "", raising=False)
    import_plugins(["orchard_plugin_of_a_test"])
    assert __import__("sys").plugged == "orchard_plugin_of_a_test"
    with pytest.raises(ConfigError) as refused:
        import_plugins(["orchard_plugin_that_is_nowhere"])
    assert refused.value.code == "config.plugin_missing"
