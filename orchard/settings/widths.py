"""Beam widths: one number for all levels of the codes, or a number for each.

Importable without torch and without Ray.
"""

from typing import Annotated, Any

from pydantic import BeforeValidator

from orchard.errors import ConfigError

Width = int | tuple[int, ...]
"""Prefixes that a beam keeps at every level, or at each level in turn."""


def _checked(value: Any) -> Any:
    """Return the width; raise ValueError unless it is a positive number or a list of some."""
    numbers: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
    if not numbers or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in numbers):
        raise ValueError(
            "a beam width is a whole number of at least 1, or a list with one for each level"
        )
    return value


Widths = Annotated[Width, BeforeValidator(_checked)]
"""Setting of a beam width: a positive number, or a list of one for each level."""


def widest(width: Width) -> int:
    """Return the largest number of prefixes at any level."""
    return width if isinstance(width, int) else max(width)


def narrowest(width: Width) -> int:
    """Return the smallest number of prefixes at any level."""
    return width if isinstance(width, int) else min(width)


def last(width: Width) -> int:
    """Return the width at the last level, which is the largest number of candidates."""
    return width if isinstance(width, int) else width[-1]


def at_least(width: Width, least: int) -> Width:
    """Return the width with no level below `least`."""
    return max(width, least) if isinstance(width, int) else tuple(max(w, least) for w in width)


def at_most(width: Width, most: int) -> Width:
    """Return the width with no level above `most`."""
    return min(width, most) if isinstance(width, int) else tuple(min(w, most) for w in width)


def of_levels(width: Width, depth: int, setting: str = "width") -> tuple[int, ...]:
    """Return the width at each of `depth` levels.

    Raises:
        ConfigError: a list has another number of levels; the message names `setting`.
    """
    if isinstance(width, int):
        return (width,) * depth
    if len(width) != depth:
        raise ConfigError(
            f"{setting} = {shown(width)} has {len(width)} numbers, the semantic IDs have {depth} "
            "levels; give one number for each level, or one for all",
            code="config.widths_of_other_depth",
        )
    return width


def shown(width: Width) -> int | list[int]:
    """Return the width as a run file writes it."""
    return width if isinstance(width, int) else list(width)
