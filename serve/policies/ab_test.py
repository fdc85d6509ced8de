"""Which variant answers a user: the same one every time, on every replica."""

import hashlib
from collections.abc import Mapping

MAIN = "main"


def hash_to_unit(user: str, salt: str) -> float:
    """A number in [0, 1) that depends on user and salt alone."""
    seal = hashlib.sha256(f"{salt}\0{user}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(seal[:7], "big") / 2**56


def assign_variant(user: str | None, shares: Mapping[str, float], salt: str) -> str:
    """The variant of a user; requests without a user are answered by the main one.

    Variants take their shares from the bottom, in the order of their names, so that adding to the
    share of the last one moves nobody between the others.
    """
    if user is None:
        return MAIN
    place, edge = hash_to_unit(user, salt), 0.0
    for name in sorted(shares):
        edge += shares[name]
        if place < edge:
            return name
    return MAIN
