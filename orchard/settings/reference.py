"""Generate the configuration reference page from the settings classes.

Run `python -m cluster.cli.reference > docs/configuration.md`; a test compares the page with the
settings.
"""

import typing
from collections.abc import Iterator, Mapping, Sequence

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from orchard.settings import Config


def page(names: Mapping[str, Sequence[str]]) -> str:
    """Return the page in Markdown: every setting with its default and meaning.

    `names` are the names in the registries, by the setting that has one of them.
    """
    lines = [
        "# Configuration",
        "",
        "A run is a TOML file; on the command line any setting is `section.key=value`. "
        "Unknown keys are refused.",
        "",
        "| setting | default | meaning |",
        "|---|---|---|",
    ]
    lines += [
        f"| `{key}` | {default} | {meaning} |" for key, default, meaning in rows(Config, names)
    ]
    return "\n".join(lines) + "\n"


def rows(
    section: type[BaseModel], names: Mapping[str, Sequence[str]], prefix: str = ""
) -> Iterator[tuple[str, str, str]]:
    """Yield the dotted key, default and meaning of each setting below a section."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from rows(kind, names, f"{prefix}{name}.")
        else:
            key = f"{prefix}{name}"
            yield key, _default(field), _meaning(field, names.get(key, ()))


def _default(field: FieldInfo) -> str:
    """Return the default of a setting as Markdown."""
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined:
        return "required"
    return "none" if value is None else f"`{value}`"


def _meaning(field: FieldInfo, names: Sequence[str]) -> str:
    """Return the description of a setting, followed by its choices or names."""
    text = " ".join((field.description or "").split())
    choices = [str(c) for c in typing.get_args(field.annotation) if isinstance(c, str)] or names
    return ". ".join(part for part in (text.rstrip("."), ", ".join(choices)) if part)
