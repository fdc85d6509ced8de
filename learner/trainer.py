"""Update the policy on one rank: forward, backward over micro-batches, clip, step.

Every rank has a shard of the batch whose weights are global, so the loss is a plain sum over ranks
and micro-batches; DDP and FSDP average, hence the factor `world`.
"""

import copy
import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float32
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from learner import finite
from learner.batch.microbatch import micro_batches, shard, without_choices
from learner.batch.sft import weighted_nll
from learner.blocks import checkpoint_blocks, shard_parameters
from learner.logprob_model import LogprobModel
from learner.logprobs import to_tensors
from learner.loss import LossStats, policy_loss
from learner.value import value_loss
from orchard.errors import UpdateError
from orchard.optim import make_optimizer, make_schedule
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.policy.value_head import detach, value_head_of
from orchard.settings import LearnerConfig
from orchard.types import TrainBatch


def apply_tis(
    batch: TrainBatch, logprob: Float32[np.ndarray, " E"], bound: float
) -> tuple[TrainBatch, float]:
    """Apply truncated importance sampling (TIS) to a batch.

    Each choice's advantage is weighted by min(pi_learner / pi_behavior, bound), and the clipped
    ratio starts from `logprob`, the learner's log-probabilities before its first update. So the
    effect of the search's older weights or different arithmetic is corrected once and not clipped
    away (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training";
    the bound: Espeholt et al. 2018, arXiv 1802.01561). Also return the largest absolute log-ratio.
    """
    log_ratio = logprob - batch.behaviour_logprob
    weight = np.minimum(np.exp(log_ratio), np.float32(bound))
    corrected = replace(
        batch,
        behaviour_logprob=logprob,
        advantage_pos=batch.advantage_pos * weight,
        advantage_neg=batch.advantage_neg * weight,
    )
    return corrected, float(np.abs(log_ratio).max(initial=0.0))


class Trainer:
    """Policy, reference, weight average and optimizer of one rank."""

    def __init__(
        self,
        policy: PreTrainedModel,
        tokenizer: ItemTokenizer,
        config: LearnerConfig,
        *,
        total_steps: int,
        ema_decay: float = 0.0,
        temperature: float = 1.0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Prepare a policy for training.

        Args:
            policy: policy to train, in place.
            tokenizer: catalog's trie and the tokens of its codes.
            config: rates, clips and the reference.
            total_steps: length of the learning-rate schedule.
            ema_decay: decay of a moving average of the weights, kept as a copy; 0 for none.
            temperature: sampling temperature of free text.
            device: device of all weights and batches.
            rank: rank of this worker.
            world: number of workers.
        """
        self.config, self.rank, self.world = config, rank, world
        self.device = torch.device(device)
        context = (tokenizer.to(self.device), config.logprob)
        common: Any = {"temperature": temperature, "attention": config.attention}
        self.policy = policy
        cast(nn.Module, policy).to(self.device)
        self.copies: dict[str, LogprobModel] = {}
        """Frozen copies of the policy: `reference` of the KL, `average` over the updates."""
        self._ema_decay = ema_decay
        for name, enabled in (("reference", config.kl.weight > 0), ("average", ema_decay > 0)):
            if enabled:
                frozen = copy.deepcopy(self.policy).eval().requires_grad_(False)
                if name == "reference":
                    detach(frozen)  # it only scores; the average is exported with its value head
                self.copies[name] = LogprobModel(frozen, *context, **common)
        self.scorer: nn.Module = LogprobModel(
            self.policy, *context, detach=config.value.detach, **common
        )
        if config.gradient_checkpointing:  # after the copies, which have no gradients
            checkpoint_blocks(self.policy)
        if world > 1 and config.parallel == "ddp":
            self.scorer = DistributedDataParallel(self.scorer)
        elif world > 1:
            shard_parameters(self.scorer, self.policy)
            for scorer in self.copies.values():
                shard_parameters(scorer, scorer.policy)
        head = value_head_of(self.policy)
        self._head = list(head.parameters()) if head is not None else []
        self.optimizer: AdamW = make_optimizer(
            self.scorer,
            lr=config.lr,
            weight_decay=config.weight_decay,
            head_params=self._head,
            head_lr=config.value.lr,
        )
        self.schedule: LambdaLR = make_schedule(
            self.optimizer,
            total_steps=total_steps,
            warmup=config.warmup,
            final_lr=config.final_lr,
        )
        self.updates = 0
        self._section = "learner"
        """Section of the settings that the updates follow."""

    @property
    def eval_policy(self) -> PreTrainedModel:
        """Model to evaluate and keep: the average where there is one, else the policy."""
        return self.copies["average"].policy if "average" in self.copies else self.policy

    def sft_step(self, batch: TrainBatch) -> dict[str, float]:
        """Make one maximum-likelihood update on the choices of the batch."""
        self.policy.train()

        def loss(part: TrainBatch[Tensor]) -> tuple[Tensor, LossStats]:
            nll = weighted_nll(self.scorer(part)[0], part.advantage_pos)
            return nll, LossStats(surrogate=float(nll.detach()))

        self._section = "sft"
        stats, metrics = self._update(self._split(batch), loss)
        return {"nll": stats.surrogate} | metrics

    def rl_step(self, batch: TrainBatch) -> dict[str, float]:
        """Make the configured number of updates on one batch of scored trees."""
        self.policy.eval()
        begin = time.perf_counter()
        gap, parts = self._dropout_gap(batch), self._split(batch)
        if self.config.dropout:
            self.policy.train()
        elif self.config.logprob == "full":
            # The search's log-probabilities are of another distribution, so a ratio to them would
            # be no importance ratio; published trainers, too, start from the learner's own.
            parts = [replace(part, behaviour_logprob=self._logprobs(part)) for part in parts]
        elif self.config.tis_clip:
            corrected = [apply_tis(p, self._logprobs(p), self.config.tis_clip) for p in parts]
            parts = [part for part, _ in corrected]
            gap = self._max_over_ranks(max(part_gap for _, part_gap in corrected))
        metrics: dict[str, float] = {}
        for _ in range(self.config.updates_per_batch):
            stats, rates = self._update(parts, self._surrogate)
            if self.config.kl.reference == "ema" and self.updates % self.config.kl.ema_every == 0:
                self._update_ema("reference", self.config.kl.ema_share)
            metrics = stats.metrics() | rates
            metrics |= {"value_loss": stats.value} if self._head else {}
            metrics |= {"target_nll": stats.target_nll} if batch.codes is not None else {}
            # Only the first update compares equal weights, as a check of the two needs.
            gap = metrics["logprob_gap"] if gap is None else gap
        return metrics | {
            "logprob_gap": gap or 0.0,
            "update_s": time.perf_counter() - begin,
            "forward_tokens": float(batch.forward_tokens),
            "flat_over_packed": batch.flat_tokens / max(1, batch.forward_tokens),
        }

    @torch.no_grad()
    def score(self, batch: TrainBatch) -> Float32[np.ndarray, " B"]:
        """Sum the log-probabilities of each row's choices, as a search computes them.

        This is a collective operation under FSDP: every rank scores the same batch.
        """
        self.policy.eval()
        part = to_tensors(batch, self.device)
        with self._precision():
            logprob: Tensor = self.scorer(part, "trie")[0]
        total = torch.zeros(len(batch.token), device=self.device)
        return total.index_add(0, part.row, logprob.float()).cpu().numpy()

    def _dropout_gap(self, batch: TrainBatch) -> float | None:
        """Return the log-probability gap to the search on the first micro-batch, under dropout.

        Return None without dropout, where the updates themselves measure the gap.
        """
        if not self.config.dropout or self.config.logprob == "full":
            return None
        part = to_tensors(next(micro_batches(batch, self.config.max_tokens)), self.device)
        with torch.no_grad(), self._precision():
            logprob: Tensor = self.scorer(part)[0]
        return float((logprob - part.behaviour_logprob).abs().max()) if len(logprob) else 0.0

    @torch.no_grad()
    def _logprobs(self, part: TrainBatch) -> Float32[np.ndarray, " E"]:
        """Compute a micro-batch's log-probabilities exactly as its first update will."""
        with self._precision():
            logprob: Tensor = self.scorer(to_tensors(part, self.device))[0]
        return logprob.float().cpu().numpy()

    def _surrogate(self, part: TrainBatch[Tensor]) -> tuple[Tensor, LossStats]:
        """Compute the loss of a micro-batch: of the policy, of target codes and of values."""
        reference: Tensor | None = None
        if "reference" in self.copies:
            with torch.no_grad():
                reference = self.copies["reference"](replace(part, values=None, codes=None))[0]
        logprob, entropy, value, code_logprob = self.scorer(part)
        if self.config.dropout:
            part = replace(part, behaviour_logprob=logprob.detach())
        loss, stats = policy_loss(logprob, entropy, reference, part, self.config)
        if code_logprob is not None and part.codes is not None:
            nll = weighted_nll(code_logprob, part.codes.weight)
            loss, stats = loss + nll, replace(stats, target_nll=float(nll.detach()))
        if value is None or part.values is None:
            return loss, stats
        config = self.config.value
        error = value_loss(value, part.values, discount=config.discount, target=config.target)
        return loss + config.weight * error, replace(stats, value=float(error.detach()))

    def _split(self, batch: TrainBatch) -> list[TrainBatch]:
        """Split this rank's shard into micro-batches, as many as every other rank's."""
        parts = list(micro_batches(shard(batch, self.rank, self.world), self.config.max_tokens))
        # All ranks must run the same number of backward passes, or their collectives deadlock.
        missing = int(self._max_over_ranks(float(len(parts)))) - len(parts)
        return parts + [without_choices(parts[-1])] * missing

    def _update(
        self,
        parts: Sequence[TrainBatch],
        loss: Callable[[TrainBatch[Tensor]], tuple[Tensor, LossStats]],
    ) -> tuple[LossStats, dict[str, float]]:
        """Accumulate over micro-batches, clip and step; return all ranks' stats and the rates."""
        total = LossStats()
        self.optimizer.zero_grad(set_to_none=True)
        for index, part in enumerate(parts):
            with self._gradient_sync(last=index == len(parts) - 1), self._precision():
                value, stats = loss(to_tensors(part, self.device))
                (value * self.world).backward()
            total += stats
        limit = self.config.grad_clip or float("inf")
        head_ids = {id(p) for p in self._head}
        shared = [p for p in self.scorer.parameters() if id(p) not in head_ids]
        norm = nn.utils.clip_grad_norm_(shared, limit)
        if self._head:
            # Clipped apart: under one norm, a large value error would scale down the policy.
            head_norm = nn.utils.clip_grad_norm_(self._head, limit)
            norm = norm if math.isfinite(finite.number(norm)) else head_norm + norm
        if not math.isfinite(finite.number(norm)):
            cause = finite.cause(parts) or self._state_of_weights()
            raise UpdateError(
                f"update {self.updates + 1} was not applied, because its gradient is not finite: "
                f"{cause}"
            )
        self.optimizer.step()
        rate = float(self.schedule.get_last_lr()[0])
        self.schedule.step()
        self.updates += 1
        self._update_average()
        return self._sum_over_ranks(total), {"grad_norm": finite.number(norm), "lr": rate}

    def check_logprobs(self, logprob: Float32[np.ndarray, " B"]) -> None:
        """Raise UpdateError if log-probabilities under the newest weights are not finite."""
        if not np.isfinite(logprob).all():
            raise UpdateError(
                f"after update {self.updates} the policy gives log-probabilities that are not "
                f"finite: {self._state_of_weights()}"
            )

    def _state_of_weights(self) -> str:
        """Describe how far the updates have driven the weights."""
        return finite.state_of_weights(
            self.policy, self.config, section=self._section, updates=self.updates
        )

    def _precision(self) -> AbstractContextManager[object]:
        """Enter bfloat16 autocast, unless the configured dtype is float32."""
        if self.config.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    @contextmanager
    def _gradient_sync(self, *, last: bool) -> Generator[None]:
        """Synchronize gradients under DDP once per update, with the last micro-batch."""
        if isinstance(self.scorer, DistributedDataParallel) and not last:
            with self.scorer.no_sync():
                yield
        else:
            yield

    def _max_over_ranks(self, value: float) -> float:
        """Return the largest value of any rank."""
        if self.world == 1:
            return value
        largest = torch.tensor(float(value), device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return float(largest)

    def _sum_over_ranks(self, stats: LossStats) -> LossStats:
        """Combine the statistics of all ranks."""
        if self.world == 1:
            return stats
        gathered: list[LossStats] = [stats] * self.world
        dist.all_gather_object(gathered, stats)
        return sum(gathered, LossStats())

    def _update_average(self) -> None:
        """Update the average, if there is one, after an optimizer step."""
        # The decay is smaller at first, or the random initial weights would linger.
        decay = min(self._ema_decay, (1 + self.updates) / (10 + self.updates))
        self._update_ema("average", 1 - decay)

    def _update_ema(self, name: str, share: float) -> None:
        """Move a copy toward the policy by a share of the distance."""
        if name not in self.copies:
            return
        with torch.no_grad():
            current = dict(self.policy.named_parameters())
            for parameter_name, average in self.copies[name].policy.named_parameters():
                average.lerp_(current[parameter_name], share)
