"""The page on rewards: its table is complete."""

import re
from pathlib import Path

from rewards.registry import REWARDS

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()


def test_every_reward_has_a_row() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert set(REWARDS) <= set(rows)
