"""Deterministic A/B assignment of users to variants, identical on every replica."""

import hashlib
from collections.abc import Mapping

MAIN = "main"


def hash_to_unit(user: str, salt: str) -> float:
    """Hash user and salt to a number in [0, 1)."""
    user_hash = hashlib.sha256(f"{salt}\0{user}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(user_hash[:7], "big") / 2**56


def assign_variant(user: str | None, shares: Mapping[str, float], salt: str) -> str:
    """Return the variant of a user, the main one for requests without a user.

    Variants occupy consecutive intervals of [0, 1) from 0, in the order of their names, so that a
    larger share of the last one moves no user between the others.
    """
    if user is None:
        return MAIN
    user_position, upper = hash_to_unit(user, salt), 0.0
    for name in sorted(shares):
        upper += shares[name]
        if user_position < upper:
            return name
    return MAIN
