"""The controller: the actors of a run, and what they can be asked to do together."""

import asyncio
import dataclasses
import signal
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import numpy as np
import ray
from jaxtyping import Float32, Int64

from cluster.actors.pool import Pool
from cluster.actors.session import cpus_needed, ray_session
from cluster.monitoring.exporter import Exporter
from cluster.training.loggers import open_loggers
from cluster.training.measure import measure
from cluster.training.run import Run
from cluster.training.run_dir import open_run_dir
from learner.ray_trainer import TrainerHandle
from learner.spec import LearnerSpec
from orchard.data.prompts import Split, make_prompts, make_windows, rows_of_step
from orchard.errors import ActorError, RunInterrupted
from orchard.evaluation.ranking import Evaluation
from orchard.policy.weights import Weights
from orchard.settings import Config
from orchard.tracking.metrics_log import MetricsLogger
from orchard.types import PolicyVersion, Prompts, ScoredTrees, SearchTrees
from rewards.actor import RewardActor
from rollout.actor import RolloutActor
from rollout.candidates import Candidates
from rollout.probe import LogprobProbe

EXACT, ROUNDED = 1e-3, 0.5
"""Nats that search and learner may be apart in float32, and in bfloat16: docs/operations.md."""

AGAIN = "the same command resumes"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PublishedWeights:
    """A version, the object reference of its weights, and what its holders must answer."""

    policy: PolicyVersion
    weights: Any
    probe: LogprobProbe | None = None


def probe_tolerance(config: Config) -> float:
    """Nats that a log-probability of the search may be off the learner's by rounding alone."""
    exact = {config.rollout.dtype, config.learner.dtype} == {"float32"}
    return config.cluster.probe_tolerance or (EXACT if exact else ROUNDED)


class Controller:
    """The running parts of a command, phase by phase. Made by `launch`."""

    def __init__(self, run: Run, metrics_logger: MetricsLogger, exporter: Exporter) -> None:
        """Start the actors of the first phase; `ready` waits for them."""
        self.run, self.metrics_logger, self.exporter = run, metrics_logger, exporter
        self.stopping = asyncio.Event()
        """Set once the run is told to stop; it then ends after the step in hand."""
        exporter.set("orchard_policy_lag_bound_versions", run.config.cluster.max_off_policy_steps)
        exporter.set("orchard_logprob_gap_bound_nats", probe_tolerance(run.config))
        self._tokenizer = ray.put(run.tokenizer)
        self._newest = PublishedWeights(policy=PolicyVersion(step=-1, digest=""), weights=None)
        self._held: dict[Pool, PublishedWeights] = {}
        """What each pool was last given, for actors that start later."""
        self.ranking: Pool | None = None
        """Who evaluates, from the first evaluation on."""
        self._begin()

    def _begin(self) -> None:
        run, config = self.run, self.run.config
        self.learner = TrainerHandle(self._assignment(), storage=run.dir / "checkpoints")
        self.rollout: Pool | None = None
        self.rewards: Pool | None = None
        if run.phase == "train":
            self.rollout = self._rollout_pool(
                "rollout", config.rollout.engine, config.rollout.actors
            )
            self.rewards = self._reward_pool()
            self.exporter.attach("rollout", self.rollout)
            self.exporter.attach("rewards", self.rewards)
            # Rollout actors cannot rank with an average while they search with the newest weights.
            if config.evaluate.engine == config.rollout.engine and not config.learner.ema_decay:
                if self.ranking is not None:
                    self.ranking.close()
                self.ranking = self.rollout

    async def ready(self) -> None:
        """Wait until the actors of the phase answer."""
        pools = [pool for pool in (self.rollout, self.rewards) if pool is not None]
        await asyncio.gather(*(pool.ready() for pool in pools))

    async def start_phase(self, run: Run) -> None:
        """Begin another phase of the same command. Only the actors that rank are kept."""
        await self.learner.close()
        for pool in (self.rollout, self.rewards):
            if pool is not None and pool is not self.ranking:
                pool.close()
        self._held = {pool: held for pool, held in self._held.items() if pool is self.ranking}
        self.run = run
        open_run_dir(run)
        self._begin()
        await self.ready()

    async def sync_weights(
        self,
        policy: PolicyVersion,
        weights: Weights,
        probed: Float32[np.ndarray, " B"] | None = None,
    ) -> None:
        """Give a version to every holder; each verifies the digest before it switches.

        With the learner's own log-probabilities of the probe, `probed`, it also has to find the
        same. A holder that does not is replaced, and has searched nothing by then.
        """
        probe = None if probed is None else self._probe(probed)
        self._newest = PublishedWeights(policy=policy, weights=ray.put(dict(weights)), probe=probe)
        self.exporter.set("orchard_policy_version", policy.step, "learner")
        if self.rollout is not None:
            await self._install(self.rollout, self._newest)

    async def scored_trees(self, step: int) -> ScoredTrees:
        """Search and score the prompts of a 0-based step, spread over the actors."""
        config = self.run.config
        rows = rows_of_step(
            step,
            num_rows=len(self.run.train),
            per_step=config.learner.prompts_per_step,
            seed=config.seed,
        )
        # Smaller requests than batch_size where that keeps every actor busy.
        share = -(-len(rows) // config.rollout.actors)
        size = min(config.rollout.batch_size, share)
        # Until the value head has something to say, the beam finds what it learns from.
        warming = config.rollout.search == "ved" and step < config.rollout.ved.warmup
        kind = "beam" if warming else config.rollout.search
        parts = [
            self.search(
                self.run.train,
                rows[at : at + size],
                seed=config.seed * 1_000_003 + step,
                kind=kind,
            )
            for at in range(0, len(rows), size)
        ]
        return ScoredTrees.concatenate(await asyncio.gather(*parts))

    async def search(
        self, split: Split, rows: Int64[np.ndarray, " R"], *, seed: int, kind: str
    ) -> ScoredTrees:
        """One request to a rollout actor and one to a reward actor, in a training controller."""
        assert self.rollout is not None, "only a training house has rollout actors"
        assert self.rewards is not None
        prompts = make_prompts(self.run.tokenizer, split, rows)
        trees: SearchTrees = await self.rollout.call("search", prompts, seed, kind)
        return await self.rewards.call("score", trees)

    async def evaluate(
        self,
        split: Split,
        rows: Int64[np.ndarray, " R"],
        *,
        policy: PolicyVersion,
        weights: Weights,
        beams: int,
        advance: Callable[[], None] | None = None,
    ) -> Evaluation:
        """Constrained beam search on held-out rows under a policy.

        `advance` is called after each batch of `evaluate.batch_size` rows.
        """
        config = self.run.config
        if self.ranking is None:
            self.ranking = self._rollout_pool("ranking", config.evaluate.engine, 1)
            self.exporter.attach("ranking", self.ranking)
            await self.ranking.ready()
        ranking = self.ranking
        asked = (policy.step, policy.digest)
        held = self._held.get(ranking)
        if held is None or asked != (held.policy.step, held.policy.digest):
            newest = self._newest
            if asked != (newest.policy.step, newest.policy.digest):
                newest = PublishedWeights(policy=policy, weights=ray.put(dict(weights)))
            await self._install(ranking, newest)
        size = config.evaluate.batch_size
        batches = [
            make_prompts(self.run.tokenizer, split, rows[at : at + size])
            for at in range(0, len(rows), size)
        ]

        async def rank(prompts: Prompts) -> Candidates:
            found: Candidates = await ranking.call("rank", prompts, beams, config.evaluate.think)
            if advance is not None:
                advance()
            # In the other phases a signal waits for the end of an update or an epoch.
            if self.stopping.is_set() and self.run.phase == "evaluate":
                raise RunInterrupted(f"stopped while evaluating; {AGAIN}")
            return found

        found = await asyncio.gather(*(rank(prompts) for prompts in batches))
        return measure(self.run, split, rows, Candidates.concatenate(found), beams, policy)

    async def save(self) -> None:
        """Write a checkpoint of the learner; raises CheckpointError as `RemoteLearner.save`."""
        await self.learner.save()
        self.exporter.set("orchard_checkpoint_step", self._newest.policy.step)
        self.exporter.set("orchard_checkpoint_timestamp_seconds", time.time())

    async def close(self) -> None:
        """Stop every actor of the controller."""
        await self.learner.close()
        for pool in {id(p): p for p in (self.rollout, self.rewards, self.ranking) if p}.values():
            pool.close()

    def restarts(self) -> dict[str, float]:
        """Actors replaced so far, by pool."""
        pools = {"rollout": self.rollout, "rewards": self.rewards}
        counts = {f"{name}/restarts": float(p.restarts) for name, p in pools.items() if p}
        return counts | {"learner/restarts": float(self.learner.restarts)}

    async def _install(self, pool: Pool, held: PublishedWeights) -> None:
        self._held[pool], policy = held, held.policy
        timeout_s = self.run.config.cluster.publish_timeout_s
        answers: list[PolicyVersion] = await pool.broadcast(
            "load_weights", policy, held.weights, held.probe, timeout_s=timeout_s
        )
        for version in answers:
            if (version.step, version.digest) != (policy.step, policy.digest):
                raise ActorError(
                    f"a {pool.name} actor holds policy {version} after {policy} was published; run "
                    "the same command again, and see logs in the run folder"
                )
        for index in range(len(answers)):
            self.exporter.set("orchard_policy_version", policy.step, f"{pool.name}-{index}")

    def _probe(self, score: Float32[np.ndarray, " B"]) -> LogprobProbe:
        run = self.run
        rows = np.arange(len(score))  # of the train split, and ids at the same time
        return LogprobProbe(
            prompts=make_prompts(run.tokenizer, run.train, rows),
            leaf=run.catalog.leaf_of_item[run.train.target[rows]],
            score=score,
            tolerance=probe_tolerance(run.config),
        )

    def _assignment(self) -> LearnerSpec:
        run, config = self.run, self.run.config
        supervised = run.phase == "sft"
        traces = (run.train, run.traces) if supervised and run.traces is not None else None
        tasks = run.tasks if supervised else None
        windows, per_epoch = None, 0
        if supervised and traces is None and tasks is None:
            windows = make_windows(run.train, max_history=config.data.max_history)
        if supervised:
            examples = next(one for one in (tasks, windows, run.train) if one is not None)
            per_epoch = -(-len(examples) // config.sft.batch_size)
        probed = 0 if supervised else min(config.cluster.probe_prompts, len(run.train))
        return LearnerSpec(
            probe=make_prompts(run.tokenizer, run.train, np.arange(probed)) if probed else None,
            config=config,
            phase="sft" if supervised else "train",
            policy=run.policy.resolve(),
            tokenizer=run.tokenizer,
            sequences=windows,
            traces=traces,
            tasks=tasks,
            total_steps=config.sft.epochs * per_epoch
            if supervised
            else config.learner.steps * config.learner.updates_per_batch,
        )

    def _rollout_pool(self, name: str, engine: str, size: int) -> Pool:
        run, rollout = self.run, self.run.config.rollout
        settings = rollout.model_copy(update={"engine": engine})
        critic = ray.put(run.critic)

        def make(index: int) -> Any:
            return RolloutActor.options(num_cpus=1, num_gpus=rollout.gpus).remote(
                settings, run.policy.resolve(), self._tokenizer,
                run.config.seed + index, critic,
            )  # fmt: skip

        pool = Pool(
            name,
            make,
            size=size,
            queue=2,
            timeout_s=rollout.timeout_s,
            retries=2,
            max_restarts=rollout.max_restarts,
            start_timeout_s=rollout.start_timeout_s,
            section="rollout",
        )

        async def catch_up(actor: Any) -> None:
            if (held := self._held.get(pool)) is not None:
                answer = actor.load_weights.remote(held.policy, held.weights, held.probe)
                limit = run.config.cluster.publish_timeout_s
                await asyncio.wait_for(asyncio.wrap_future(answer.future()), limit)

        pool.on_start = catch_up
        return pool

    def _reward_pool(self) -> Pool:
        rewards, known = self.run.config.rewards, ray.put(self.run.knowledge)
        return Pool(
            "rewards",
            lambda _: RewardActor.options(num_cpus=1).remote(known),
            size=rewards.actors,
            queue=rewards.queue,
            timeout_s=rewards.timeout_s,
            retries=rewards.retries,
            max_restarts=rewards.max_restarts,
            start_timeout_s=self.run.config.rollout.start_timeout_s,
        )


@asynccontextmanager
async def start_controller(run: Run) -> AsyncGenerator[Controller]:
    """A controller with the actors of its first phase up; torn down in reverse."""
    open_run_dir(run)
    with (
        open_loggers(run) as (metrics_logger, exporter),
        ray_session(run.config.cluster, cpus=cpus_needed(run.config), logs=run.dir / "logs"),
    ):
        exporter.listen(run.config.cluster, run.dir)
        controller = Controller(run, metrics_logger, exporter)
        # After ray.init, which puts a handler of its own in the place of any earlier one.
        with suppress(ValueError):  # signals reach the main thread alone
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, controller.stopping.set)
        try:
            await controller.ready()
            yield controller
        finally:
            await controller.close()
