"""Actions of the loop on a running endpoint and cluster; see `cluster.loop.rounds.Actions`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from cluster.loop.collect import Collector
from cluster.loop.gate import Measured
from cluster.loop.measure import measure_policy
from cluster.loop.publish import CANARY, MAIN, Policies, wait_until_served
from cluster.loop.rounds import Collected
from cluster.loop.state import RoundState
from cluster.loop.train import add_replay, train_round
from orchard.feedback.schema import FEEDBACK, ROWS, is_feedback
from orchard.settings import Config

Train = Callable[..., Path]


@dataclass(frozen=True, kw_only=True)
class EndpointActions:
    """Actions of a loop: an endpoint that follows links, a collector, and a trainer."""

    settings: Config
    policies: Policies
    collector: Collector
    url: str
    """Address of the endpoint."""
    has_canary: bool
    """Whether the endpoint has the variant of the canary."""
    train_policy: Train = train_round
    """Trains a policy on feedback folders; see `cluster.loop.train.train_round`."""

    def publish(self, main: str, canary: str) -> None:
        """Switch the links, and wait until the endpoint answers with both policies."""
        self.policies.switch(main, canary)
        wanted = {MAIN: self.version(main)}
        if self.has_canary:
            wanted[CANARY] = self.version(canary)
        wait_until_served(self.url, wanted)

    def collect(self, state: RoundState, last: RoundState | None) -> Collected:
        """Collect the window of a round."""
        return self.collector.collect(state, last)

    def collected(self, state: RoundState) -> pl.DataFrame:
        """Return the feedback that was collected in a round."""
        folder = self.collector.folder(state.number)
        if not is_feedback(folder):
            return pl.DataFrame(schema=FEEDBACK)
        return pl.read_parquet(folder / ROWS)

    def train(self, state: RoundState) -> str:
        """Train a policy from the main one, and keep it under the number of the next round."""
        name = f"{state.number + 1:05d}"
        if not self.policies.path(name).is_dir():
            trained = self.train_policy(
                self.settings, state.number, policy=self.policies.path(state.main),
                feedback=self._feedback(state.number), folder=self.policies.folder,
            )  # fmt: skip
            self.policies.keep(name, trained)
        return name

    def version(self, policy: str) -> str:
        """Return the version of a policy."""
        return self.policies.version(policy)

    def measure(self, policy: str, rows: pl.DataFrame) -> Measured | None:
        """Measure a policy on feedback."""
        return measure_policy(self.policies.path(policy), rows)

    def _feedback(self, number: int) -> Sequence[Path]:
        """Return the feedback folders that a round learns from."""
        folders = [self.collector.folder(n) for n in range(number)]
        return add_replay(
            self.collector.feedback, number, older=[f for f in folders if is_feedback(f)],
            share=self.settings.loop.replay, seed=self.settings.seed,
        )  # fmt: skip
