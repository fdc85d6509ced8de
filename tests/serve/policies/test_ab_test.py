"""Split of users over variants."""

import pytest

from serve.policies.ab_test import assign_variant


def test_the_hash_of_users_keeps_to_the_shares() -> None:
    users = [str(user) for user in range(4000)]
    first = [assign_variant(user, {"b": 0.2, "c": 0.3}, "salt") for user in users]
    assert first.count("b") == pytest.approx(800, abs=100)
    assert first.count("c") == pytest.approx(1200, abs=100)
    grown = [assign_variant(user, {"b": 0.2, "c": 0.4}, "salt") for user in users]
    for before, after in zip(first, grown, strict=True):
        assert before == after or (before, after) == ("main", "c")
    assert [assign_variant(u, {"b": 0.2, "c": 0.3}, "other") for u in users] != first
    assert assign_variant(None, {"b": 1.0}, "salt") == "main"
