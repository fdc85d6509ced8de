"""Run the jobs of one rank of the learner, and publish what they make; free of Ray."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from learner import checkpoint
from learner.publisher import ObjectStore, Publisher
from learner.spec import LearnerSpec, learner_config, pack_probe, sft_epoch
from learner.trainer import Trainer
from orchard.policy import lora, model, value_head
from orchard.policy.store import Policy
from orchard.registry import import_plugins
from orchard.types import PolicyVersion, TrainBatch, Update


class LearnerWorker:
    """Trainer and publisher of one rank."""

    def __init__(
        self,
        spec: LearnerSpec,
        store: ObjectStore,
        *,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Load the policy of a specification and prepare to train it.

        Args:
            spec: specification of the phase, identical on every rank.
            store: where rank 0 puts weights.
            device: device of all weights and batches.
            rank: rank of this worker.
            world: number of workers.
        """
        config, supervised = spec.config, spec.phase == "sft"
        import_plugins(config.plugins)
        torch.set_num_threads(config.learner.threads)
        self._spec, self._rank, self._supervised = spec, rank, supervised
        policy = Policy.open(spec.policy, spec.tokenizer).model
        lora.attach(policy, config.model.lora, seed=config.seed)
        if config.model.value_head and not supervised:
            value_head.attach(policy, seed=config.seed)
        else:
            value_head.detach(policy)
        model.add_dropout(policy, config.model.dropout if supervised else config.learner.dropout)
        self._publisher = Publisher(policy, config.cluster.publish_format, store, writes=rank == 0)
        self._trainer = Trainer(
            policy,
            spec.tokenizer,
            learner_config(config, spec.phase),
            total_steps=spec.total_steps,
            ema_decay=config.sft.ema_decay if supervised else config.learner.ema_decay,
            temperature=1.0 if supervised else config.rollout.temperature,
            device=device,
            rank=rank,
            world=world,
        )
        self._probe = None if spec.probe is None else pack_probe(spec, spec.probe)
        self.number = 0
        """Number of the last job done."""

    def load(self, folder: Path) -> None:
        """Continue from the checkpoint in a folder; raises CheckpointError."""
        catalog, data = self._spec.tokenizer.catalog.digest, self._spec.data
        self.number = checkpoint.load(self._trainer, folder, catalog=catalog, data=data)

    def snapshot(self) -> dict[str, Any]:
        """Copy the training state; empty on other ranks than 0. Collective under FSDP."""
        return checkpoint.snapshot(
            self._trainer,
            number=self.number,
            catalog=self._spec.tokenizer.catalog.digest,
            data=self._spec.data,
            write=self._rank == 0,
        )

    def epoch(self, advance: Callable[[], None]) -> Update | None:
        """Run the next job, a supervised epoch, and publish; `advance` is called at each update."""
        self._begin_job()
        return self.publish(sft_epoch(self._trainer, self._spec, self.number, advance))

    def update(self, batch: TrainBatch, *, needs_eval: bool = True) -> Update | None:
        """Run the next job, an RL step, and publish; `needs_eval` as in `publish`."""
        self._begin_job()
        return self.publish(self._trainer.rl_step(batch), needs_eval=needs_eval)

    def publish(
        self, metrics: Mapping[str, float] | None = None, *, needs_eval: bool = True
    ) -> Update | None:
        """Store the weights of the last job; return the update on rank 0, None on others.

        Args:
            metrics: what the job measured.
            needs_eval: whether to store the weights to evaluate and keep as well.

        Raises:
            UpdateError: the probe's log-probabilities are not finite.
        """
        trainer, publisher = self._trainer, self._publisher
        searched = trainer.eval_policy if self._supervised else trainer.policy
        published = publisher.publish(searched)
        is_distinct = needs_eval and searched is not trainer.eval_policy
        average = publisher.publish(trainer.eval_policy, exact=True) if is_distinct else None
        rounds = needs_eval and publisher.rounds and not is_distinct
        exact = publisher.publish(searched, exact=True) if rounds else None
        adapter = lora.factors(trainer.eval_policy) if needs_eval else None
        probe_logprobs = None if self._probe is None else trainer.score(self._probe)
        if probe_logprobs is not None:
            trainer.check_logprobs(probe_logprobs)
        if published is None:
            return None
        eval_weights = None
        if average is not None:
            eval_weights = PolicyVersion(step=self.number, digest=average.digest), average
        return Update(
            policy=PolicyVersion(step=self.number, digest=published.digest),
            metrics=metrics or {},
            weights=published,
            adapter=publisher.store(adapter) if adapter else None,
            probe_logprobs=probe_logprobs,
            eval_weights=eval_weights,
            exact_weights=exact,
        )

    def _begin_job(self) -> None:
        """Count a job, and draw all its randomness from its number."""
        self.number += 1
        torch.manual_seed(hash((self._spec.config.seed, self.number, self._rank)) % 2**63)
