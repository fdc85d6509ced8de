"""Building blocks of settings: a frozen section that knows its old names, and bounded numbers."""

import logging
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]

_warned: set[str] = set()


class Section(BaseModel):
    """A frozen part of the configuration; every field documents itself below its line.

    Keys and values of earlier versions are taken under their new names, with a warning.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    section: ClassVar[str] = ""
    """Dotted name of the section in a run file."""
    renamed: ClassVar[Mapping[str, str]] = {}
    """Old key -> new key."""
    renamed_values: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    """New key -> old value -> new value."""

    @model_validator(mode="before")
    @classmethod
    def _with_new_names(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = cast("dict[str, Any]", data)
        tree: dict[str, Any] = {}
        for key, value in given.items():
            name = cls.renamed.get(key, key)
            if name != key:
                if name in given:
                    raise ValueError(f"{key} is now {name}, and both are set; remove {key}")
                cls._warn(key, name)
            choices = cls.renamed_values.get(name, {})
            if isinstance(value, str) and value in choices:
                cls._warn(f'{name} = "{value}"', f'"{choices[value]}"')
                value = choices[value]
            tree[name] = value
        return tree

    @classmethod
    def _warn(cls, old: str, new: str) -> None:
        named = new if new.startswith('"') else f"{cls.section}.{new}"
        text = f"{cls.section}.{old} is now {named}"
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
