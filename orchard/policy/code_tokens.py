"""Find how a tokenizer spells the codes of semantic IDs, such as `<a_5>` or `<s_a_340>`.

Published checkpoints have spellings of their own. A spelling is a text around a name of the level
and the code; all levels and codes of a catalog have tokens of one spelling.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from orchard.errors import CatalogError

_TOKEN = re.compile(r"(?s)(.*?)([a-z]|\d{1,2})([_:|-]?)(\d+)(\D*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """Text of a code's token: `before`, the level's name, `between`, the code, `after`."""

    before: str = "<"
    between: str = "_"
    after: str = ">"
    first: str = "a"
    """Name of the first level: a letter, or a number that counts on."""

    def token(self, level: int, code: int) -> str:
        """Return the token of a code of a 0-based level."""
        name = str(int(self.first) + level) if self.first.isdigit() else chr(ord("a") + level)
        return f"{self.before}{name}{self.between}{code}{self.after}"

    def tokens(self, level_size: Sequence[int]) -> list[str]:
        """Return the tokens of all codes, level by level."""
        sizes = enumerate(level_size)
        return [self.token(level, code) for level, size in sizes for code in range(size)]


PUBLISHED = Spelling()
"""Spelling of the published data sets, which new policies have: `<a_5>` is code 5 of level 1."""


def find_spelling(vocabulary: Collection[str], level_size: Sequence[int]) -> Spelling:
    """Return the spelling in which a vocabulary has the codes of a catalog.

    `PUBLISHED` comes first; without any spelling that has all codes it is `PUBLISHED`, too, of
    which codes are then missing.

    Raises:
        CatalogError: several other spellings have all codes.
    """
    known = vocabulary if isinstance(vocabulary, dict | set) else set(vocabulary)

    def has_all(spelling: Spelling) -> bool:
        return all(token in known for token in spelling.tokens(level_size))

    if has_all(PUBLISHED):
        return PUBLISHED
    # Every spelling has a token of the first code.
    named = (_TOKEN.fullmatch(token) for token in known if "0" in token)
    spellings = {
        Spelling(before=m[1], between=m[3], after=m[5], first=m[2])
        for m in named
        if m is not None and m[4] == "0" and m[2] in ("a", "0", "1")
    }
    found = sorted((s for s in spellings if has_all(s)), key=lambda s: s.token(0, 0))
    if len(found) > 1:
        raise CatalogError(
            f"the policy's tokenizer spells codes in {len(found)} ways, "
            f"{' and '.join(s.token(0, 0) for s in found[:2])} among them, and has all codes in "
            "each; remove the tokens that the policy does not use"
        )
    return found[0] if found else PUBLISHED
