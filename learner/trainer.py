"""The update on one rank: forward, backward over micro-batches, clip, step.

Every rank holds a shard of the batch whose weights are global, so the loss is a plain sum over
ranks and micro-batches; DDP and FSDP average, hence the factor `world`.
"""

import copy
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, replace
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float32
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from learner.batch.microbatch import micro_batches, shard
from learner.batch.sft import weighted_nll
from learner.logprob_model import LogprobModel
from learner.logprobs import BatchTensors, to_tensors
from learner.loss import LossStats, policy_loss
from learner.value import value_loss
from orchard.optim import make_optimizer, make_schedule
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.policy.value_head import detach, value_head_of
from orchard.settings import LearnerConfig
from orchard.types import SequenceTargets, TrainBatch, ValueTargets


def apply_tis(
    batch: TrainBatch, own: Float32[np.ndarray, " E"], bound: float
) -> tuple[TrainBatch, float]:
    """Truncated importance sampling (TIS): a batch as if this learner had searched it.

    Each choice's advantage is weighted by min(pi_own / pi_behaviour, bound), and the clipped ratio
    starts from `own`, the learner's log-probabilities before its first update: what the search's
    older version or other arithmetic changed is corrected once and not clipped away (Yao et al.
    2025, "Your efficient RL framework secretly brings you off-policy RL training"; the bound:
    Espeholt et al. 2018, arXiv 1802.01561). Also returns the largest |own - behaviour|.
    """
    apart = own - batch.behaviour_logprob
    weight = np.minimum(np.exp(apart), np.float32(bound))
    corrected = replace(
        batch,
        behaviour_logprob=own,
        advantage_pos=batch.advantage_pos * weight,
        advantage_neg=batch.advantage_neg * weight,
    )
    return corrected, float(np.abs(apart).max(initial=0.0))


class Trainer:
    """Weights, reference and optimiser of one rank."""

    def __init__(
        self,
        policy: PreTrainedModel,
        tokenizer: ItemTokenizer,
        config: LearnerConfig,
        *,
        total_steps: int,
        average: float = 0.0,
        temperature: float = 1.0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Take the policy over.

        Args:
            policy: to be trained, in place.
            tokenizer: the catalog's legal sequences and the tokens of their codes.
            config: rates, clips and the anchor.
            total_steps: length of the learning-rate schedule.
            average: decay of a moving average of the weights, kept beside them; 0 keeps none.
            temperature: that free text was drawn with.
            device: of everything here.
            rank: of this worker.
            world: number of workers.
        """
        self.config, self.rank, self.world = config, rank, world
        self.device = torch.device(device)
        context = (tokenizer.to(self.device), config.logprob)
        self.policy = policy
        cast(nn.Module, policy).to(self.device)
        self.copies: dict[str, LogprobModel] = {}
        """Frozen models beside the policy: `reference` of the KL, `average` of its own course."""
        self._decay = average
        for name, wanted in (("reference", config.kl.weight > 0), ("average", average > 0)):
            if wanted:
                frozen = copy.deepcopy(self.policy).eval().requires_grad_(False)
                if name == "reference":
                    detach(frozen)  # it only scores; an average is what is kept, its head included
                self.copies[name] = LogprobModel(frozen, *context, temperature=temperature)
        self.scorer: nn.Module = LogprobModel(
            self.policy, *context, detach=config.value.detach, temperature=temperature
        )
        if world > 1 and config.parallel == "ddp":
            self.scorer = DistributedDataParallel(self.scorer)
        elif world > 1:
            _shard_parameters(self.scorer, self.policy)
            for one in self.copies.values():
                _shard_parameters(one, one.policy)
        head = value_head_of(self.policy)
        self._head = list(head.parameters()) if head is not None else []
        self.optimizer: AdamW = make_optimizer(
            self.scorer,
            lr=config.lr,
            weight_decay=config.weight_decay,
            own=self._head,
            own_lr=config.value.lr,
        )
        self.schedule: LambdaLR = make_schedule(
            self.optimizer,
            total_steps=total_steps,
            warmup=config.warmup,
            final_lr=config.final_lr,
        )
        self.updates = 0

    @property
    def result(self) -> PreTrainedModel:
        """The weights worth keeping: the average where there is one, else the policy's own."""
        return self.copies["average"].policy if "average" in self.copies else self.policy

    def sft_step(self, batch: TrainBatch) -> dict[str, float]:
        """One update towards the choices of the batch (maximum likelihood)."""
        self.policy.train()

        def loss(part: BatchTensors) -> tuple[Tensor, LossStats]:
            value = weighted_nll(self.scorer(part)[0], part.advantage_pos)
            return value, LossStats(surrogate=float(value.detach()))

        parts, metrics = self._update(self._cut(batch), loss)
        return {"nll": parts.surrogate} | metrics

    def rl_step(self, batch: TrainBatch) -> dict[str, float]:
        """The configured number of updates on one batch of scored trees."""
        self.policy.eval()
        begin = time.perf_counter()
        gap, mine = self._gap(batch), self._cut(batch)
        if self.config.dropout:
            self.policy.train()
        elif self.config.logprob == "full":
            # The search's log-probabilities are of another distribution, so that a ratio to them
            # would be no importance ratio; published trainers compare with themselves, too.
            mine = [replace(part, behaviour_logprob=self._own(part)) for part in mine]
        elif self.config.tis_clip:
            both = [apply_tis(part, self._own(part), self.config.tis_clip) for part in mine]
            mine, gap = [part for part, _ in both], self._largest(max(apart for _, apart in both))
        metrics: dict[str, float] = {}
        for _ in range(self.config.updates_per_batch):
            parts, rates = self._update(mine, self._surrogate)
            if self.config.kl.reference == "ema" and self.updates % self.config.kl.ema_every == 0:
                self._update_ema("reference", self.config.kl.ema_share)
            metrics = parts.metrics() | rates
            metrics |= {"value_loss": parts.value} if self._head else {}
            # Only the first update compares the same weights, as the gate wants.
            gap = metrics["logprob_gap"] if gap is None else gap
        return metrics | {
            "logprob_gap": gap or 0.0,
            "update_s": time.perf_counter() - begin,
            "forward_tokens": float(batch.forward_tokens),
            "flat_over_packed": batch.flat_tokens / max(1, batch.forward_tokens),
        }

    @torch.no_grad()
    def score(self, batch: TrainBatch) -> Float32[np.ndarray, " B"]:
        """Log-probability of all choices of each row together, as a search would have it.

        Collective where the parameters are sharded: every rank scores the same batch.
        """
        self.policy.eval()
        part = to_tensors(batch, self.device)
        with self._precision():
            logprob: Tensor = self.scorer(part, "trie")[0]
        total = torch.zeros(len(batch.token), device=self.device)
        return total.index_add(0, part.row, logprob.float()).cpu().numpy()

    def _gap(self, batch: TrainBatch) -> float | None:
        """Under dropout, the largest gap between search and learner on the first micro-batch.

        None where the updates themselves compare the two.
        """
        if not self.config.dropout or self.config.logprob == "full":
            return None
        part = to_tensors(next(micro_batches(batch, self.config.max_tokens)), self.device)
        with torch.no_grad(), self._precision():
            logprob: Tensor = self.scorer(part)[0]
        return float((logprob - part.behaviour_logprob).abs().max()) if len(logprob) else 0.0

    @torch.no_grad()
    def _own(self, part: TrainBatch) -> Float32[np.ndarray, " E"]:
        """Log-probabilities of a micro-batch's choices, as its first update will compute them."""
        with self._precision():
            logprob: Tensor = self.scorer(to_tensors(part, self.device))[0]
        return logprob.float().cpu().numpy()

    def _surrogate(self, part: BatchTensors) -> tuple[Tensor, LossStats]:
        reference: Tensor | None = None
        if "reference" in self.copies:
            with torch.no_grad():
                reference, _, _ = self.copies["reference"](replace(part, values=None))
        logprob, entropy, value = self.scorer(part)
        if self.config.dropout:
            part = replace(part, behaviour_logprob=logprob.detach())
        loss, parts = policy_loss(
            logprob,
            entropy,
            reference,
            part,
            clip_low=self.config.clip_low,
            clip_high=self.config.clip_high,
            dual_clip=self.config.dual_clip,
            kl_weight=self.config.kl.weight,
        )
        if value is None or part.values is None:
            return loss, parts
        own = self.config.value
        error = value_loss(value, part.values, discount=own.discount, target=own.target)
        return loss + own.weight * error, replace(parts, value=float(error.detach()))

    def _cut(self, batch: TrainBatch) -> list[TrainBatch]:
        """This rank's micro-batches, as many as any other rank's."""
        mine = list(micro_batches(shard(batch, self.rank, self.world), self.config.max_tokens))
        # All ranks must run equally many backward passes, or their exchanges do not meet.
        return mine + [_without_choices(mine[-1])] * (
            int(self._largest(float(len(mine)))) - len(mine)
        )

    def _update(
        self,
        mine: Sequence[TrainBatch],
        loss: Callable[[BatchTensors], tuple[Tensor, LossStats]],
    ) -> tuple[LossStats, dict[str, float]]:
        """Accumulate over micro-batches, clip, step; the parts of all ranks and the rates."""
        total = LossStats()
        self.optimizer.zero_grad(set_to_none=True)
        for index, part in enumerate(mine):
            with self._exchange(last=index == len(mine) - 1), self._precision():
                value, parts = loss(to_tensors(part, self.device))
                (value * self.world).backward()
            total += parts
        limit = self.config.grad_clip or float("inf")
        own = {id(p) for p in self._head}
        shared = [p for p in self.scorer.parameters() if id(p) not in own]
        norm = nn.utils.clip_grad_norm_(shared, limit)
        if self._head:
            # Under one norm, a value far off its target would hold the policy back.
            nn.utils.clip_grad_norm_(self._head, limit)
        self.optimizer.step()
        rate = float(self.schedule.get_last_lr()[0])
        self.schedule.step()
        self.updates += 1
        self._update_average()
        return self._over_ranks(total), {"grad_norm": _number(norm), "lr": rate}

    def _precision(self) -> AbstractContextManager[object]:
        if self.config.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    @contextmanager
    def _exchange(self, *, last: bool) -> Generator[None]:
        """Exchange gradients once per update, with the last micro-batch."""
        if isinstance(self.scorer, DistributedDataParallel) and not last:
            with self.scorer.no_sync():
                yield
        else:
            yield

    def _largest(self, value: float) -> float:
        """The largest value of any rank."""
        if self.world == 1:
            return value
        most = torch.tensor(float(value), device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return float(most)

    def _over_ranks(self, parts: LossStats) -> LossStats:
        if self.world == 1:
            return parts
        everyone: list[LossStats] = [parts] * self.world
        dist.all_gather_object(everyone, parts)
        return sum(everyone, LossStats())

    def _update_average(self) -> None:
        """Move the average, if there is one, after an update."""
        # Shorter at first, or the random start would linger.
        self._update_ema("average", 1 - min(self._decay, (1 + self.updates) / (10 + self.updates)))

    def _update_ema(self, name: str, share: float) -> None:
        """Move a copy towards the policy by a share of the way."""
        if name not in self.copies:
            return
        with torch.no_grad():
            current = dict(self.policy.named_parameters())
            for parameter, slow in self.copies[name].policy.named_parameters():
                slow.lerp_(current[parameter], share)


def _shard_parameters(scorer: nn.Module, policy: PreTrainedModel) -> None:
    """FSDP2: each decoder block is a unit of its own, the rest (embeddings, norm) is the root."""
    for block in cast(nn.ModuleList, policy.base_model.layers):
        fully_shard(block)
    fully_shard(scorer)


def _without_choices(batch: TrainBatch) -> TrainBatch:
    """One row of the batch with nothing to learn: no loss, but a backward pass to take part in."""
    row = replace(
        batch,
        token=batch.token[:1],
        position=batch.position[:1],
        subtree_end=batch.subtree_end[:1],
    )
    per_choice = (
        "row", "query_slot", "state", "chosen", "behaviour_logprob", "advantage_pos",
        "advantage_neg", "kl_weight",
    )  # fmt: skip
    values = batch.values
    if values is not None:
        values = ValueTargets(**{f.name: getattr(values, f.name)[:0] for f in fields(values)})
    whole = batch.sequences
    if whole is not None:
        whole = SequenceTargets(**{f.name: getattr(whole, f.name)[:0] for f in fields(whole)})
    return replace(
        row,
        **{name: getattr(batch, name)[:0] for name in per_choice},
        values=values,
        sequences=whole,
    )


def _number(value: Tensor) -> float:
    """A scalar, gathered first where it is sharded."""
    full = getattr(value, "full_tensor", None)
    return float(full() if full is not None else value)
