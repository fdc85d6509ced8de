"""Base class of the settings sections, which accepts old key names, and bounded number types."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
"""Number between 0 and 1, bounds included."""

_warned: set[str] = set()
"""Texts of the warnings that were logged; each is logged once per process."""


def refusal(code: str, sentence: str) -> PydanticCustomError:
    """Return the error of values that contradict each other, for a validator to raise.

    `orchard.config` raises it as a ConfigError of the code `config.CODE`.
    """
    # pydantic_core asks for literals so that messages are templates; this one has no placeholders.
    return PydanticCustomError(cast("Any", f"config.{code}"), cast("Any", sentence))


class Section(BaseModel):
    """Frozen section of the configuration; the string below a field is its description.

    Keys and values of earlier versions are accepted, translated to the new names, with a warning.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    section: ClassVar[str] = ""
    """Dotted name of the section in a run file."""
    renamed: ClassVar[Mapping[str, str]] = {}
    """Renamed keys: old key -> new key."""
    renamed_values: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    """Renamed values: new key -> old value -> new value."""

    @model_validator(mode="before")
    @classmethod
    def _with_new_names(cls, data: Any) -> Any:
        """Replace old keys and values with the new ones, before validation."""
        if not isinstance(data, dict):
            return data
        raw = cast("dict[str, Any]", data)
        tree: dict[str, Any] = {}
        for key, value in raw.items():
            name = cls.renamed.get(key, key)
            if name != key:
                if name in raw:
                    raise refusal(
                        "renamed_key_twice",
                        f"{key} is now {name}, and both are set; remove {key}",
                    )
                cls._warn(key, name)
            choices = cls.renamed_values.get(name, {})
            if isinstance(value, str) and value in choices:
                cls._warn(f'{name} = "{value}"', f'"{choices[value]}"')
                value = choices[value]
            tree[name] = value
        return tree

    @field_validator("*", mode="after")
    @classmethod
    def _with_home(cls, value: Any) -> Any:
        """Replace a leading `~` of a path, which no shell sees in a file or after `key=`."""
        if not isinstance(value, Path):
            return value
        try:
            return value.expanduser()
        except RuntimeError as error:
            raise ValueError(f"{error}; write the folder out") from error

    @classmethod
    def _warn(cls, old: str, new: str) -> None:
        """Log once that an old name of the section was used."""
        replacement = new if new.startswith('"') else f"{cls.section}.{new}"
        text = f"{cls.section}.{old} is now {replacement}"
        if text not in _warned:
            _warned.add(text)
            logging.getLogger("orchard").warning("%s; the old name still works", text)


def current_key(root: type[BaseModel], key: str) -> str:
    """Replace old names in a dotted key of the configuration `root`."""
    section: Any = root
    parts: list[str] = []
    for part in key.split("."):
        name = part
        if isinstance(section, type) and issubclass(section, BaseModel):
            name = getattr(section, "renamed", {}).get(part, part)
            field = section.model_fields.get(name)
            section = None if field is None else field.annotation
        parts.append(name)
    return ".".join(parts)
