"""Registries of the functions that settings name: one file and one entry to add another.

An entry is a function with the facts that the validation of a run needs:

    @SEARCHES.register("spread", SearchFacts(rules=(needs_two_candidates,)))
    def spread(ctx: SearchContext) -> SearchFn: ...

A setting such as `rollout.search` is a plain string, and `Registry.check` compares it with the
entries when a run is prepared, after `import_plugins` has imported the modules of `plugins`.
"""

import difflib
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from orchard.errors import ConfigError
from orchard.settings import Config

Rule = Callable[[Config], None]
"""Check of a configuration that names an entry; raises ConfigError if the two do not fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Properties of an entry that the validation of a run looks up; registries add fields."""

    rules: tuple[Rule, ...] = ()
    """Checks of the configurations that name the entry."""


F = TypeVar("F", bound=Callable[..., Any])
D = TypeVar("D", bound=Facts)


class Registry(Mapping[str, F], Generic[F, D]):
    """Mapping of names to functions, with the facts of each."""

    def __init__(
        self, noun: str, settings: tuple[str, ...], default: D, rules: tuple[Rule, ...] = ()
    ) -> None:
        """Make an empty registry.

        Args:
            noun: kind of the entries in messages, such as "search".
            settings: dotted settings whose value is a name, or whose keys are names.
            default: facts of entries that are registered without any.
            rules: checks of every configuration, whatever entry it names.
        """
        self.noun, self.settings, self.rules = noun, settings, rules
        self._default = default
        self._functions: dict[str, F] = {}
        self._facts: dict[str, D] = {}

    def register(self, name: str, facts: D | None = None) -> Callable[[F], F]:
        """Return a decorator that registers a function under `name`.

        Raises:
            ConfigError: another function has the name (by the decorator).
        """

        def add(function: F) -> F:
            other = self._functions.get(name)
            if other is not None and _origin(other) != _origin(function):
                raise ConfigError(
                    f"{_origin(function)} and {_origin(other)} both register the {self.noun} "
                    f"{name}; rename one of them",
                    code="config.name_taken",
                )
            self._functions[name] = function
            self._facts[name] = self._default if facts is None else facts
            return function

        return add

    def __getitem__(self, name: str) -> F:
        """Return the function of a name; raises KeyError for an unknown one."""
        return self._functions[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names in order of their registration."""
        return iter(self._functions)

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self._functions)

    def facts(self, name: str) -> D:
        """Return the facts of a name; raises KeyError for an unknown one."""
        return self._facts[name]

    def check_name(self, name: str, setting: str) -> None:
        """Raise ConfigError, with the nearest known name, if `setting` names no entry."""
        if name in self._functions:
            return
        near = difflib.get_close_matches(name, self._functions, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(self)}"
        raise ConfigError(
            f"{setting} names an unknown {self.noun} {name}; {hint}", code="config.unknown_name"
        )

    def check(self, config: Config) -> None:
        """Check the names in the registry's settings, and the rules of their entries.

        Raises:
            ConfigError: a name is unknown, or an entry does not fit the configuration.
        """
        named: dict[str, None] = {}  # ordered, each once
        for setting in self.settings:
            for name in names_in(config, setting):
                self.check_name(name, setting)
                named[name] = None
        for rule in (*self.rules, *(rule for name in named for rule in self._facts[name].rules)):
            rule(config)


def names_in(config: Config, setting: str) -> tuple[str, ...]:
    """Return the names in a dotted setting: one, several, the keys of a mapping, or none."""
    value: Any = config
    for part in setting.split("."):
        value = getattr(value, part)
    if isinstance(value, Mapping):
        return tuple(cast("Mapping[str, object]", value))
    if isinstance(value, tuple):
        return cast("tuple[str, ...]", value)
    return () if value is None else (str(value),)


def import_plugins(modules: Iterable[str]) -> None:
    """Import modules that register entries; they may lie in the working directory.

    Raises:
        ConfigError: a module cannot be imported.
    """
    for module in modules:
        here = str(Path.cwd())
        if here not in sys.path:
            sys.path.append(here)
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(
                f"plugins names the module {module}, which cannot be imported ({error}); install "
                "it, or put its folder on PYTHONPATH",
                code="config.plugin_missing",
            ) from error


def _origin(function: Callable[..., Any]) -> str:
    """Return the module and name of a function or class."""
    module = getattr(function, "__module__", "?")
    return f"{module}.{getattr(function, '__qualname__', repr(function))}"
