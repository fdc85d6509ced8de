"""Generate the configuration reference page from the settings classes.

Run `python -m orchard.settings.reference > docs/configuration.md`; a test compares the page with
the settings.
"""

import typing
from collections.abc import Iterator

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from orchard.settings import Config


def page() -> str:
    """Return the page in Markdown: every setting with its default and meaning."""
    lines = [
        "# Configuration",
        "",
        "A run is a TOML file; on the command line any setting is `section.key=value`. "
        "Unknown keys are refused.",
        "",
        "| setting | default | meaning |",
        "|---|---|---|",
    ]
    lines += [f"| `{key}` | {default} | {meaning} |" for key, default, meaning in rows(Config)]
    return "\n".join(lines) + "\n"


def rows(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield the dotted key, default and meaning of each setting below a section."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from rows(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _default(field), _meaning(field)


def _default(field: FieldInfo) -> str:
    """Return the default of a setting as Markdown."""
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined:
        return "required"
    return "none" if value is None else f"`{value}`"


def _meaning(field: FieldInfo) -> str:
    """Return the description of a setting, followed by its choices if it is a literal type."""
    text = " ".join((field.description or "").split())
    choices = [str(c) for c in typing.get_args(field.annotation) if isinstance(c, str)]
    return ". ".join(part for part in (text.rstrip("."), ", ".join(choices)) if part)


if __name__ == "__main__":
    print(page(), end="")
