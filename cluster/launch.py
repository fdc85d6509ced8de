"""The house: the actors of a run, and what they can be asked to do together."""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import ray
from jaxtyping import Int64

from cluster.pool import Pool
from cluster.prepare import Run, open_folder
from cluster.session import cpus_needed, ray_session
from learner.train import Assignment, RemoteLearner
from orchard import evaluation
from orchard.errors import ActorError
from orchard.evaluation import Evaluation
from orchard.metrics import Logbook
from orchard.prompts import Split, rows_of_step, sequences
from orchard.types import PolicyVersion, Prompts, ScoredTrees, SearchTrees
from orchard.weights import Weights
from rewards.actor import RewardActor
from rollout.actor import RolloutActor
from rollout.candidates import Candidates


class House:
    """The running parts of a command, phase by phase. Made by `launch`."""

    def __init__(self, run: Run, logbook: Logbook) -> None:
        """Start the actors of the first phase; `ready` waits for them."""
        self.run, self.logbook = run, logbook
        self._catalogue = ray.put(run.catalogue)
        self._policy = PolicyVersion(step=-1, digest="")
        self._weights: Any = None
        self._ranking: Pool | None = None
        self._begin()

    def _begin(self) -> None:
        run, config = self.run, self.run.config
        self.learner = RemoteLearner(self._assignment(), storage=run.dir / "checkpoints")
        self.rollout: Pool | None = None
        self.rewards: Pool | None = None
        if run.phase == "train":
            self.rollout = self._rollout_pool(config.rollout.engine, config.rollout.actors)
            self.rewards = self._reward_pool()
            # Rollout actors cannot rank with an average while they search with the newest weights.
            if config.evaluate.engine == config.rollout.engine and not config.learner.average:
                if self._ranking is not None:
                    self._ranking.close()
                self._ranking = self.rollout

    async def ready(self) -> None:
        """Wait until the actors of the phase answer."""
        pools = [pool for pool in (self.rollout, self.rewards) if pool is not None]
        await asyncio.gather(*(pool.ready() for pool in pools))

    async def turn_to(self, run: Run) -> None:
        """Begin another phase of the same command. Only the actors that rank are kept."""
        await self.learner.close()
        for pool in (self.rollout, self.rewards):
            if pool is not None and pool is not self._ranking:
                pool.close()
        self.run = run
        open_folder(run)
        self._begin()
        await self.ready()

    async def publish(self, policy: PolicyVersion, weights: Weights) -> None:
        """Give a version to every holder; each verifies the digest before it switches."""
        self._policy, self._weights = policy, ray.put(dict(weights))
        if self.rollout is not None:
            await self._install(self.rollout, self._policy, self._weights)

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
        policy: PolicyVersion,
        weights: Weights,
        beams: int,
        advance: Callable[[], None] | None = None,
    ) -> Evaluation:
        """Constrained beam search on held-out rows under a policy.

        `advance` is called after each batch of `evaluate.batch_size` rows.
        """
        config = self.run.config
        if self._ranking is None:
            self._ranking = self._rollout_pool(config.evaluate.engine, 1)
            await self._ranking.ready()
        ranking = self._ranking
        if (policy.step, policy.digest) != (self._policy.step, self._policy.digest) or (
            ranking is not self.rollout
        ):
            await self._install(ranking, policy, ray.put(dict(weights)))
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
        return measure(self.run, split, rows, Candidates.concatenate(found), beams, policy)

    async def close(self) -> None:
        """Stop every actor of the house."""
        await self.learner.close()
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

    async def _install(self, pool: Pool, policy: PolicyVersion, weights: Any) -> None:
        timeout_s = self.run.config.cluster.publish_timeout_s
        held: list[PolicyVersion] = await pool.broadcast(
            "install", policy, weights, timeout_s=timeout_s
        )
        for version in held:
            if (version.step, version.digest) != (policy.step, policy.digest):
                raise ActorError(
                    f"a rollout actor holds policy {version} after {policy} was published"
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
    """A house with the actors of its first phase up; torn down in reverse."""
    open_folder(run)
    with (
        Logbook(run.dir) as logbook,
        ray_session(run.config.cluster, cpus=cpus_needed(run.config), logs=run.dir / "logs"),
    ):
        house = House(run, logbook)
        try:
            await house.ready()
            yield house
        finally:
            await house.close()


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
