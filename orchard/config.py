"""Load and validate the configuration of a run. Importable without torch and without Ray.

A run is a TOML file plus dotted overrides (`learner.lr=1e-4`); each component receives its own
section of `orchard.settings`. Unknown keys are rejected with the closest known key as a hint.
"""

import copy
import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import tomli_w
from pydantic import BaseModel, ValidationError

from orchard.errors import ConfigError
from orchard.settings import Config
from orchard.settings.section import current_key


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Load the run of a TOML file and apply overrides such as `learner.lr=1e-4`.

    Relative data paths are relative to the working directory, like all other paths.

    Raises:
        ConfigError: a missing or broken file, an unknown key, or a value out of bounds.
    """
    if not path.is_file():
        raise ConfigError(
            f"run file {path} does not exist; see cluster/runs/ for examples",
            code="config.no_file",
        )
    try:
        tree = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"run file {path} is not valid TOML: {error}", code="config.bad_toml"
        ) from error
    return parse(tree, overrides)


def parse(tree: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Validate the run of a nested mapping with overrides applied.

    Raises:
        ConfigError: the run is invalid; the message has one sentence per error, the code is that
            of the first.
    """
    overridden = copy.deepcopy(dict(tree))
    for override in overrides:
        _set(overridden, override)
    try:
        return Config.model_validate(overridden)
    except ValidationError as error:
        errors = [dict(each) for each in error.errors()]
        raise ConfigError("; ".join(map(_sentence, errors)), code=_code(errors[0])) from error


def dump(config: Config) -> str:
    """Return the resolved run as TOML, from which `parse` restores it."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def differences(a: Config, b: Config) -> list[str]:
    """Return the dotted keys in which two runs differ, with both values."""
    left, right = flatten(a.model_dump(mode="json")), flatten(b.model_dump(mode="json"))
    return [
        f"{key} = {right.get(key)} (was {left.get(key)})"
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key)
    ]


def _set(tree: dict[str, Any], override: str) -> None:
    """Apply the override `a.b=value` in place."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(
            f"override {override!r} is not of the form section.key=value",
            code="config.bad_override",
        )
    *sections, last = _keys(key.strip())
    value = _value(text.strip(), as_text=_is_text([*sections, last]))
    for section in sections:
        branch = tree.setdefault(section, {})
        if not isinstance(branch, dict):
            raise ConfigError(
                f"override {override!r}: {section} is a value, not a section; set that value "
                "itself",
                code="config.bad_override",
            )
        tree = cast(dict[str, Any], branch)
    tree[last] = value


def _keys(key: str) -> list[str]:
    """Split a dotted key, whose parts may be quoted, and replace old names."""
    parts = key.split(".")
    if '"' in key or "'" in key:
        try:
            tree: Any = tomllib.loads(f"{key} = 0")
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{key} is not the key of a setting: {error}") from error
        parts = list[str]()
        while isinstance(tree, dict):
            parts += tree
            tree = tree[parts[-1]]
    plain = next((n for n, part in enumerate(parts) if "." in part), len(parts))
    return [*current_key(Config, ".".join(parts[:plain])).split("."), *parts[plain:]]


def _value(text: str, *, as_text: bool) -> Any:
    """Parse the value of an override: one TOML value and nothing else, or a bare string.

    A setting that is a text takes what is no quoted string as it is. `#` begins no comment.
    """
    try:
        # Inside brackets, a comment would swallow the closing one; so it is no TOML value.
        values: list[Any] = tomllib.loads(f"value = [{text}]")["value"]
    except tomllib.TOMLDecodeError:
        return text
    if len(values) != 1 or text.startswith("#") or text.endswith(","):
        return text
    return text if as_text and not isinstance(values[0], str) else values[0]


def _is_text(keys: Sequence[str]) -> bool:
    """Check whether a setting holds a string or a path, and nothing else."""
    kind: Any = Config
    for key in keys:
        is_section = isinstance(kind, type) and issubclass(kind, BaseModel)
        field = kind.model_fields.get(key) if is_section else None
        kind = None if field is None else field.annotation
    choices = {choice for choice in get_args(kind) or (kind,) if choice is not type(None)}
    return bool(choices) and choices <= {str, Path}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a nested mapping to dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flatten(cast(Mapping[str, Any], value), f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def _known_keys() -> list[str]:
    """Return the dotted keys of all settings."""

    def walk(section: type[BaseModel], prefix: str) -> list[str]:
        keys: list[str] = []
        for name, field in section.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys += walk(kind, f"{prefix}{name}.")
            else:
                keys.append(prefix + name)
        return keys

    return walk(Config, "")


def _code(error: Mapping[str, Any]) -> str:
    """Return the code of a validation error."""
    kind = str(error["type"])
    if kind.startswith("config."):
        return kind
    known = {"extra_forbidden": "config.unknown_key", "missing": "config.missing_key"}
    return known.get(kind, "config.bad_value")


def _sentence(error: Mapping[str, Any]) -> str:
    """Describe one validation error by its value, bound and remedy."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known_keys = _known_keys()
        closest = difflib.get_close_matches(key, known_keys, n=1, cutoff=0.5)
        closest = closest or [k for k in known_keys if k.split(".")[-1] == key.split(".")[-1]]
        hint = f"did you mean {closest[0]}?" if closest else "see docs/configuration.md"
        return f"unknown key {key}; {hint}"
    if error["type"] == "missing":
        return f"{key} is missing; set it in the run file or as {key}=..."
    message = str(error["msg"]).removeprefix("Value error, ")
    # The input of a section-level error is the whole section; its message names the wrong values.
    if not key or isinstance(error["input"], dict):
        return message
    return f"{key} = {error['input']!r}: {message}"
