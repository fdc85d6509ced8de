"""The house: a Ray session, the actors of a run, and what they can be asked to do together."""

import asyncio
import dataclasses
import logging
import os
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import numpy as np
import ray
from jaxtyping import Int64

from cluster.pool import Pool
from cluster.prepare import Run, open_folder
from learner.train import Assignment, RemoteLearner
from orchard import evaluation
from orchard.config import ClusterConfig, Config
from orchard.errors import ActorError, ConfigError
from orchard.evaluation import Evaluation
from orchard.metrics import Logbook
from orchard.prompts import Split, rows_of_step, sequences
from orchard.types import PolicyVersion, Prompts, ScoredTrees, SearchTrees
from orchard.weights import Weights
from rewards.actor import RewardActor
from rollout.actor import RolloutActor
from rollout.search import Candidates


@contextmanager
def ray_session(settings: ClusterConfig, *, cpus: int) -> Generator[None]:
    """Join a cluster (`cluster.address` or RAY_ADDRESS), or run a local one and stop it after.

    An outer session is joined as it is, so that several phases can share one.

    Raises:
        ConfigError: the named cluster cannot be reached.
    """
    if ray.is_initialized():
        yield
        return
    address = settings.address or os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError) as error:
            raise ConfigError(
                f"no Ray cluster answers at {address}: {error}; start one, or unset "
                "cluster.address and RAY_ADDRESS to run locally"
            ) from error
    else:
        # A local session listens on the loopback interface and lives as long as this process.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        # Here the workers are the run; at Ray's nice 15 any other process would starve them.
        os.environ.setdefault("RAY_worker_niceness", "0")
        ray.init(address="local", num_cpus=settings.cpus or cpus, include_dashboard=False, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


def cpus_needed(config: Config) -> int:
    """Logical CPUs that the actors of a run ask for, and one for Ray Train's own."""
    return config.rollout.actors + config.rewards.actors + config.learner.workers + 2


class House:
    """The running parts of one phase. Made by `launch`."""

    def __init__(self, run: Run, logbook: Logbook) -> None:
        """Start the actors; `ready` waits for them."""
        self.run, self.logbook = run, logbook
        config = run.config
        self._catalogue = ray.put(run.catalogue)
        self._policy = PolicyVersion(step=-1, digest="")
        self._weights: Any = None
        self.learner = RemoteLearner(self._assignment(), storage=run.dir / "checkpoints")
        self.rollout: Pool | None = None
        self.rewards: Pool | None = None
        if run.phase == "train":
            self.rollout = self._rollout_pool(config.rollout.engine, config.rollout.actors)
            self.rewards = self._reward_pool()
        shared = self.rollout is not None and config.evaluate.engine == config.rollout.engine
        self._ranking = self.rollout if shared else None

    async def publish(self, policy: PolicyVersion, weights: Weights) -> None:
        """Give a version to every holder; each verifies the digest before it switches."""
        self._policy, self._weights = policy, ray.put(dict(weights))
        if self.rollout is not None:
            await self._install(self.rollout)

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
            self._score(rows[at : at + size], seed=config.seed * 1_000_003 + step, kind=kind)
            for at in range(0, len(rows), size)
        ]
        return ScoredTrees.concatenate(await asyncio.gather(*parts))

    async def evaluate(
        self,
        split: Split,
        rows: Int64[np.ndarray, " R"],
        *,
        beams: int,
        advance: Callable[[], None] | None = None,
    ) -> Evaluation:
        """Constrained beam search on held-out rows under the newest policy.

        `advance` is called after each batch of `evaluate.batch_size` rows.
        """
        config = self.run.config
        if self._ranking is None:
            self._ranking = self._rollout_pool(config.evaluate.engine, 1)
            await self._ranking.ready()
        ranking = self._ranking
        if ranking is not self.rollout:
            await self._install(ranking)
        size = config.evaluate.batch_size
        batches = [
            self.run.form.prompts(split, rows[at : at + size]) for at in range(0, len(rows), size)
        ]

        async def rank(prompts: Prompts) -> Candidates:
            found: Candidates = await ranking.call("rank", prompts, beams)
            if advance is not None:
                advance()
            return found

        found = await asyncio.gather(*(rank(prompts) for prompts in batches))
        return measure(self.run, split, rows, Candidates.concatenate(found), beams, self._policy)

    def close(self) -> None:
        """Stop every actor of the house."""
        for pool in {id(p): p for p in (self.rollout, self.rewards, self._ranking) if p}.values():
            pool.close()

    def restarts(self) -> dict[str, float]:
        """Actors replaced so far, by pool."""
        pools = {"rollout": self.rollout, "rewards": self.rewards}
        return {f"{name}/restarts": float(p.restarts) for name, p in pools.items() if p}

    async def _score(self, rows: Int64[np.ndarray, " R"], *, seed: int, kind: str) -> ScoredTrees:
        assert self.rollout is not None, "only a training house has rollout actors"
        assert self.rewards is not None
        prompts = self.run.form.prompts(self.run.train, rows)
        trees: SearchTrees = await self.rollout.call("search", prompts, seed, kind)
        return await self.rewards.call("score", trees)

    async def _install(self, pool: Pool) -> None:
        timeout_s = self.run.config.cluster.publish_timeout_s
        held: list[PolicyVersion] = await pool.broadcast(
            "install", self._policy, self._weights, timeout_s=timeout_s
        )
        for version in held:
            if (version.step, version.digest) != (self._policy.step, self._policy.digest):
                raise ActorError(
                    f"a rollout actor holds policy {version} after {self._policy} was published"
                )

    def _assignment(self) -> Assignment:
        run, config = self.run, self.run.config
        supervised = run.phase == "sft"
        windows = sequences(run.train, max_history=config.data.max_history) if supervised else None
        per_epoch = -(-len(windows) // config.sft.batch_size) if windows is not None else 0
        return Assignment(
            config=config,
            phase="sft" if supervised else "train",
            policy=run.policy.resolve(),
            catalogue=run.catalogue,
            vocabulary=run.vocabulary,
            sequences=windows,
            total_steps=config.sft.epochs * per_epoch
            if supervised
            else config.learner.steps * config.learner.updates_per_batch,
        )

    def _rollout_pool(self, engine: str, size: int) -> Pool:
        run, rollout = self.run, self.run.config.rollout
        settings = rollout.model_copy(update={"engine": engine})

        def make(index: int) -> Any:
            return RolloutActor.options(num_cpus=1, num_gpus=rollout.gpus).remote(
                settings, run.policy.resolve(), self._catalogue, run.vocabulary,
                run.config.seed + index,
            )  # fmt: skip

        pool = Pool(
            "rollout",
            make,
            size=size,
            queue=2,
            timeout_s=rollout.timeout_s,
            retries=2,
            max_restarts=rollout.max_restarts,
            start_timeout_s=rollout.start_timeout_s,
        )

        async def catch_up(actor: Any) -> None:
            if self._weights is not None:
                await asyncio.wrap_future(
                    actor.install.remote(self._policy, self._weights).future()
                )

        pool.on_start = catch_up
        return pool

    def _reward_pool(self) -> Pool:
        rewards = self.run.config.rewards
        return Pool(
            "rewards",
            lambda _: RewardActor.options(num_cpus=1).remote(rewards.weights, self._catalogue),
            size=rewards.actors,
            queue=rewards.queue,
            timeout_s=rewards.timeout_s,
            retries=rewards.retries,
            max_restarts=rewards.max_restarts,
            start_timeout_s=self.run.config.rollout.start_timeout_s,
        )


@asynccontextmanager
async def launch(run: Run) -> AsyncGenerator[House]:
    """A house with its actors up; torn down in reverse."""
    open_folder(run)
    with Logbook(run.dir) as logbook, ray_session(run.config.cluster, cpus=cpus_needed(run.config)):
        house = House(run, logbook)
        try:
            ready = [pool.ready() for pool in (house.rollout, house.rewards) if pool is not None]
            await asyncio.gather(*ready)
            yield house
        finally:
            await house.learner.close()
            house.close()


def measure(
    run: Run,
    split: Split,
    rows: Int64[np.ndarray, " R"],
    found: Candidates,
    beams: int,
    policy: PolicyVersion,
) -> Evaluation:
    """What the candidates of held-out rows are worth."""
    items = run.catalogue
    leaf_items = np.diff(items.leaf_start)
    ranks = evaluation.target_ranks(
        leaf=found.leaf,
        start=found.start,
        leaf_items=leaf_items[found.leaf],
        target_leaf=items.leaf_of_item[split.target[rows]],
        target_position=items.place_in_leaf[split.target[rows]],
    )
    extra = {
        "coverage@10": evaluation.coverage(
            leaf=found.leaf, num_leaves=items.trie.num_leaves, start=found.start, k=10
        ),
        "diversity": evaluation.diversity(path=found.node, start=found.start),
        "short_lists": float((np.diff(found.start) < beams).mean()),
        **{
            f.name: float(getattr(found.cost, f.name))
            for f in dataclasses.fields(found.cost)
            if f.name != "counts"
        },
    }
    return Evaluation(
        metrics=evaluation.metrics(
            ranks, width=beams, resamples=run.config.evaluate.resamples, seed=run.config.seed
        ),
        ranks=ranks,
        row=rows,
        width=beams,
        seconds=found.cost.seconds,
        policy=str(policy),
        catalogue=items.digest,
        extra=extra,
    )
