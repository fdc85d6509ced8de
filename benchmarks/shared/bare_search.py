"""Beam search of one history, with a policy and an engine that no endpoint shares."""

from pathlib import Path

import numpy as np

from orchard.policy.store import Policy
from orchard.types import Prompts
from rollout.engine.torch import TorchEngine
from rollout.search.beam import beam


class BareSearch:
    """Policy folder, read anew, and its beam search."""

    def __init__(self, folder: Path, width: int) -> None:
        """Read the policy and create an engine for beams of `width`."""
        policy = Policy.open(folder)
        self._tokenizer, self._width = policy.tokenizer, width
        self._engine = TorchEngine(policy.model, policy.tokenizer, policy.version)

    def prompts(self, history: list[int]) -> Prompts:
        """Return the prompt of a history of item ids."""
        rows = self._tokenizer.catalog.rows(np.array(history, dtype=np.int64))
        start, zero = np.array([0, len(rows)]), np.zeros(1, np.int64)
        token, token_start = self._tokenizer.encode_history(rows, start)
        return Prompts(
            id=zero, target=zero, history=rows, history_start=start, token=token,
            token_start=token_start,
        )  # fmt: skip

    def search(self, prompts: Prompts) -> None:
        """Run the search."""
        beam(self._engine, prompts, width=self._width)
