"""Control the actors of a run: start them, sync weights, search, score and evaluate."""

import asyncio
import signal
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from cluster.actors.backend import backend_of
from cluster.actors.pool import Pool
from cluster.actors.session import cpus_needed, ray_session
from cluster.actors.weights import PublishedWeights, load, load_all, repeated, store
from cluster.monitoring.exporter import Exporter
from cluster.training.learner_spec import learner_spec
from cluster.training.loggers import open_loggers
from cluster.training.measure import measure
from cluster.training.rollout_stream import groups_of_step
from cluster.training.run import Run
from cluster.training.run_dir import open_run_dir
from learner.workers.protocol import Learner
from orchard.data.prompts import Split, make_prompts
from orchard.errors import RunInterrupted
from orchard.evaluation.ranking import Evaluation
from orchard.guide.guide import Guide
from orchard.policy.weights import Weights
from orchard.settings.widths import Width
from orchard.tracking.metrics_log import MetricsLogger
from orchard.types import PolicyVersion, Prompts, ScoredTrees, SearchTrees, StoredTransfer
from rewards.actor import RewardWorker
from rollout.actor import RolloutWorker
from rollout.candidates import Candidates
from rollout.probe import LogprobProbe, probe_tolerance

AGAIN = "the same command resumes"
"""Hint of the messages of an interrupted run."""


class Controller:
    """Actors and learner of a command, phase by phase; created by `start_controller`."""

    def __init__(self, run: Run, metrics_logger: MetricsLogger, exporter: Exporter) -> None:
        """Start the actors of the first phase; `ready` waits for them."""
        self.run, self.metrics_logger, self.exporter = run, metrics_logger, exporter
        self.stopping = asyncio.Event()
        """Event that stops the run after the current step."""
        exporter.set("orchard_policy_lag_bound_versions", run.config.cluster.max_off_policy_steps)
        exporter.set("orchard_logprob_gap_bound_nats", probe_tolerance(run.config))
        self._backend = backend_of(run.config.cluster)
        self._tokenizer = self._backend.put(run.tokenizer)
        self._newest = PublishedWeights(policy=PolicyVersion(step=-1, digest=""))
        self._published: dict[Pool, PublishedWeights] = {}
        """Last version sent to each pool, for actors that start later."""
        self.ranking: Pool | None = None
        """Pool that evaluates, created with the first evaluation."""
        self._begin()

    def _begin(self) -> None:
        """Start the learner and the actors of the current phase."""
        run, config = self.run, self.run.config
        self.learner: Learner = self._backend.learner(
            learner_spec(run), storage=run.dir / "checkpoints", written=self._checkpoint_written
        )
        self.rollout: Pool | None = None
        self.rewards: Pool | None = None
        if run.phase == "train":
            self.rollout = self._rollout_pool(
                "rollout", config.rollout.engine, config.rollout.actors
            )
            self.rewards = self._reward_pool()
            self.exporter.attach("rollout", self.rollout)
            self.exporter.attach("rewards", self.rewards)
            if config.rollouts_evaluate:
                if self.ranking is not None:
                    self.ranking.close()
                self.ranking = self.rollout

    async def ready(self) -> None:
        """Wait until the actors of the phase have started."""
        pools = [pool for pool in (self.rollout, self.rewards) if pool is not None]
        await asyncio.gather(*(pool.ready() for pool in pools))

    async def start_phase(self, run: Run) -> None:
        """Start another phase of the same command; only the evaluation actors are kept."""
        await self.learner.close()
        for pool in (self.rollout, self.rewards):
            if pool is not None and pool is not self.ranking:
                pool.close()
        self._published = {p: sent for p, sent in self._published.items() if p is self.ranking}
        self.run = run
        open_run_dir(run)
        self._begin()
        await self.ready()

    async def sync_weights(
        self,
        policy: PolicyVersion,
        weights: Weights | StoredTransfer,
        probed: Float32[np.ndarray, " B"] | None = None,
    ) -> None:
        """Publish a version to all rollout actors; each verifies the digest before it switches.

        With the learner's log-probabilities of the probe prompts, `probed`, each actor must also
        reproduce them. An actor that does not is replaced before it runs any search.
        """
        probe = None if probed is None else self._probe(probed)
        self._newest = PublishedWeights(
            policy=policy, stored=store(weights, self._backend.put), probe=probe
        )
        self.exporter.set("orchard_policy_version", policy.step, "learner")
        if self.rollout is not None:
            await self._install(self.rollout, self._newest)

    async def scored_trees(self, step: int) -> ScoredTrees:
        """Search and score the prompts of a 0-based step, distributed over the actors."""
        split = self.run.rows

        async def search(rows: Int64[np.ndarray, " R"], seed: int, hint: int) -> ScoredTrees:
            return await self.search(split, rows, seed=seed, step=step, hint=hint)

        return await groups_of_step(step, self.run.config, search, num_rows=len(split))

    async def search(
        self,
        split: Split,
        rows: Int64[np.ndarray, " R"],
        *,
        seed: int,
        step: int | None = None,
        name: str | None = None,
        hint: int = 0,
    ) -> ScoredTrees:
        """Search rows on one rollout actor and score them on one reward actor (training only).

        `step` is None outside of a training step, `name` replaces the configured search, and `hint`
        is the number of the target's first codes that the search is given.
        """
        assert self.rollout is not None, "only the training phase has rollout actors"
        assert self.rewards is not None
        prompts = make_prompts(self.run.tokenizer, split, rows)
        trees: SearchTrees = await self.rollout.call("search", prompts, seed, step, name, hint)
        return await self.rewards.call("score", trees)

    async def evaluate(
        self,
        split: Split,
        rows: Int64[np.ndarray, " R"],
        *,
        policy: PolicyVersion,
        weights: Weights | StoredTransfer,
        beams: int,
        advance: Callable[[], None] | None = None,
    ) -> Evaluation:
        """Evaluate a policy by constrained beam search on held-out rows; see `rank`."""
        candidates = await self.rank(
            split, rows, policy=policy, weights=weights, beams=beams, advance=advance
        )
        return measure(self.run, split, rows, candidates, beams, policy)

    async def rank(
        self,
        split: Split,
        rows: Int64[np.ndarray, " R"],
        *,
        policy: PolicyVersion,
        weights: Weights | StoredTransfer,
        beams: Width,
        advance: Callable[[], None] | None = None,
        guide: Guide | None = None,
        exclude_seen: bool = False,
    ) -> Candidates:
        """Return the candidates of a policy for held-out rows by constrained beam search.

        `advance` is called after each batch of `evaluate.batch_size` rows. With a guide, prefixes
        and candidates are ranked by it; `exclude_seen` leaves out the histories.
        """
        config = self.run.config
        if self.ranking is None:
            self.ranking = self._rollout_pool("ranking", config.evaluate.engine, 1)
            self.exporter.attach("ranking", self.ranking)
            await self.ranking.ready()
        ranking = self.ranking
        wanted = (policy.step, policy.digest)
        loaded = self._published.get(ranking)
        if loaded is None or wanted != (loaded.policy.step, loaded.policy.digest):
            newest = self._newest
            if wanted != (newest.policy.step, newest.policy.digest):
                newest = PublishedWeights(policy=policy, stored=store(weights, self._backend.put))
            await self._install(ranking, newest)
        size = config.evaluate.batch_size
        batches = [
            make_prompts(self.run.tokenizer, split, rows[start : start + size])
            for start in range(0, len(rows), size)
        ]

        guide_ref = None if guide is None else self._backend.put(guide)

        async def rank(prompts: Prompts) -> Candidates:
            candidates: Candidates = await ranking.call(
                "rank", prompts, beams, config.evaluate.think, guide_ref, exclude_seen,
                config.evaluate.wide,
            )  # fmt: skip
            if advance is not None:
                advance()
            # In other phases a signal takes effect at the end of an update or an epoch.
            if self.stopping.is_set() and self.run.phase == "evaluate":
                raise RunInterrupted(f"stopped while evaluating; {AGAIN}")
            return candidates

        parts = await asyncio.gather(*(rank(prompts) for prompts in batches))
        return Candidates.concatenate(parts)

    def _checkpoint_written(self, number: int) -> None:
        self.exporter.set("orchard_checkpoint_step", number)
        self.exporter.set("orchard_checkpoint_timestamp_seconds", time.time())

    async def close(self) -> None:
        """Stop every actor of the controller."""
        await self.learner.close()
        for pool in {id(p): p for p in (self.rollout, self.rewards, self.ranking) if p}.values():
            pool.close()

    def restarts(self) -> dict[str, float]:
        """Return the number of actors replaced so far, by pool, as metrics."""
        pools = {"rollout": self.rollout, "rewards": self.rewards}
        counts = {f"{name}/restarts": float(p.restarts) for name, p in pools.items() if p}
        return counts | {"learner/restarts": float(self.learner.restarts)}

    async def _install(self, pool: Pool, published: PublishedWeights) -> None:
        """Load a version into all actors of a pool, and check the versions that they report."""
        self._published[pool] = published
        number = await load_all(
            pool,
            published,
            timeout_s=self.run.config.cluster.publish_timeout_s,
            again=partial(self._publish_again, pool),
        )
        for index in range(number):
            self.exporter.set(
                "orchard_policy_version", published.policy.step, f"{pool.name}-{index}"
            )

    async def _publish_again(self, pool: Pool) -> PublishedWeights:
        """Replace lost weights of a pool by those that the restarted learner repeats.

        Raises:
            WeightsLostError: it has not made the same version again.
        """
        lost = self._published[pool]
        again = repeated(lost, await self.learner.again(lost.policy.step))
        self._published[pool] = again
        if lost is self._newest:
            self._newest = again
        return again

    def _probe(self, score: Float32[np.ndarray, " B"]) -> LogprobProbe:
        """Build a probe of the first train rows from the learner's log-probabilities."""
        run = self.run
        rows = np.arange(len(score))  # rows of the train split, which are also prompt ids
        return LogprobProbe(
            prompts=make_prompts(run.tokenizer, run.train, rows),
            leaf=run.catalog.leaf_of_item[run.train.target[rows]],
            score=score,
            tolerance=probe_tolerance(run.config),
        )

    def _rollout_pool(self, name: str, engine: str, size: int) -> Pool:
        """Start a pool of rollout actors with an engine."""
        run, rollout = self.run, self.run.config.rollout
        settings = rollout.model_copy(update={"engine": engine})
        backend, plugins = self._backend, run.config.plugins
        critic, guide = backend.put(run.critic), backend.put(run.guide)

        def make(index: int) -> Any:
            return backend.start(
                RolloutWorker, settings, run.policy.resolve(), self._tokenizer,
                run.config.seed + index, critic, guide, plugins, gpus=rollout.gpus,
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
            kill=backend.kill,
        )

        async def catch_up(actor: Any) -> None:
            if (newest := self._published.get(pool)) is not None:
                limit = run.config.cluster.publish_timeout_s
                again = partial(self._publish_again, pool)
                await load(actor, newest, timeout_s=limit, again=again)

        pool.on_start = catch_up
        return pool

    def _reward_pool(self) -> Pool:
        """Start the pool of reward actors."""
        backend, rewards = self._backend, self.run.config.rewards
        context, plugins = backend.put(self.run.reward_context), self.run.config.plugins
        return Pool(
            "rewards",
            lambda _: backend.start(RewardWorker, context, plugins),
            size=rewards.actors,
            queue=rewards.queue,
            timeout_s=rewards.timeout_s,
            retries=rewards.retries,
            max_restarts=rewards.max_restarts,
            start_timeout_s=self.run.config.rollout.start_timeout_s,
            kill=backend.kill,
        )


@asynccontextmanager
async def start_controller(run: Run) -> AsyncGenerator[Controller]:
    """Start a controller with the actors of its first phase, and stop everything on exit."""
    with open_loggers(run) as (metrics_logger, exporter), ExitStack() as stack:
        if not run.config.cluster.in_process:
            cpus = cpus_needed(run.config)
            stack.enter_context(ray_session(run.config.cluster, cpus=cpus, logs=run.dir / "logs"))
        exporter.listen(run.config.cluster, run.dir)
        controller = Controller(run, metrics_logger, exporter)
        # After ray.init, which replaces earlier signal handlers.
        with suppress(ValueError):  # only the main thread receives signals
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, controller.stopping.set)
        try:
            await controller.ready()
            yield controller
        finally:
            await controller.close()
