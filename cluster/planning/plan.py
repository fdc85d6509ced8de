"""What a run will take of a machine, and what of it cannot work. Pure; starts nothing.

Memory counts weights, optimiser, caches and a Python process each; activations are estimated.
Seconds are extrapolated from a short calibration, and are an estimate.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cluster.actors.session import address_of, cpus_needed
from cluster.training.run import Run
from orchard.data.prompts import make_prompts
from orchard.policy import model, value_head
from orchard.settings import Config

GIB = 1 << 30
_PROCESS = int(0.55 * GIB)
"""A Python process with torch, Ray and transformers loaded, measured on Linux."""
_ADAM = 2
"""Moments per weight, in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of the policy and the data, all that memory and time follow from."""

    parameters: int
    hidden: int
    inner: int
    """Width of the MLP."""
    layers: int
    longest: int
    """Positions that the policy knows."""
    train_rows: int
    prompt_tokens: float
    """Of a mean prompt."""
    prompt_tokens_max: int
    nodes_per_level: tuple[int, ...]
    """Of the catalog's trie."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What is there."""

    cpus: int
    memory: int
    """Bytes."""
    gpus: int
    free_disk: int
    """Bytes, where the run folder goes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessGroup:
    """One kind of process."""

    name: str
    count: int
    cpus: int
    """Logical, each."""
    gpus: float
    """Each."""
    memory: int
    """Bytes, each, in system memory or on its GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Tokens per second of one process, as calibrated."""

    forward: float
    update: float
    """Forward and backward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityPlan:
    """The layout, the cost of a step, and why it cannot work, if so."""

    groups: tuple[ProcessGroup, ...]
    disk: int
    """Bytes of checkpoints and policies."""
    prefill_tokens: float
    """Per step, as the following."""
    search_tokens: float
    """Upper bound of a beam, without forced codes."""
    update_tokens: float
    search_s: float
    update_s: float
    refusals: tuple[str, ...]

    @property
    def memory(self) -> int:
        """Bytes of all rooms."""
        return sum(room.count * room.memory for room in self.groups)


def plan(config: Config, sizes: Sizes, machine: Machine, speed: Speed) -> CapacityPlan:
    """Lay out the training phase of a run."""
    learner, rollout = config.learner, config.rollout
    rooms = layout(config, sizes)
    weights = 4 * sizes.parameters
    saved = weights * (1 + _ADAM + bool(learner.ema_decay)) * config.checkpoint.keep
    width = rollout.group_size
    expanded = sum(min(width, nodes) for nodes in sizes.nodes_per_level[:-1])
    leaves = min(width, sizes.nodes_per_level[-1])
    prefill = learner.prompts_per_step * sizes.prompt_tokens
    search = float(learner.prompts_per_step * expanded)
    update = prefill + search + learner.prompts_per_step * leaves
    found = CapacityPlan(
        groups=rooms,
        disk=saved + 3 * weights,  # scratch or warm start, best checkpoint, and the result
        prefill_tokens=prefill,
        search_tokens=search,
        update_tokens=update,
        search_s=(prefill + search) / speed.forward / rollout.actors,
        update_s=learner.updates_per_batch * update / speed.update / learner.workers,
        refusals=(),
    )
    return replace(found, refusals=tuple(refusals_of(config, sizes, machine, found)))


def layout(config: Config, sizes: Sizes) -> tuple[ProcessGroup, ...]:
    """Every kind of process of the training phase, and what one of them takes."""
    learner, rollout = config.learner, config.rollout
    weights = 4 * sizes.parameters
    copies = 2 + _ADAM + bool(config.learner.kl.weight) + bool(learner.ema_decay)  # and gradients
    own = copies if learner.parallel == "ddp" else -(-copies // learner.workers) + 1
    # Kept for the backward pass: about eight states and three inner states of a token per layer.
    kept = 4 * learner.max_tokens * sizes.layers * (8 * sizes.hidden + 3 * sizes.inner)
    served = sizes.parameters * (4 if rollout.dtype == "float32" else 2)
    states = 4 * 2 * sizes.layers * sizes.hidden  # keys and values of a token, at most
    branches = rollout.group_size * len(sizes.nodes_per_level)
    cache = int(rollout.batch_size * (sizes.prompt_tokens_max + branches) * states)
    if rollout.engine == "vllm":
        cache = int(rollout.kv_cache_gib * GIB) + _PROCESS  # its engine is a process of its own
    return (
        ProcessGroup(
            name="driver", count=1, cpus=2, gpus=0.0, memory=_PROCESS + 2 * weights
        ),
        ProcessGroup(
            name="rollout", count=rollout.actors, cpus=1, gpus=rollout.gpus,
            memory=_PROCESS + served + cache,
        ),
        ProcessGroup(
            name="rewards", count=config.rewards.actors, cpus=1, gpus=0.0, memory=_PROCESS,
        ),
        ProcessGroup(
            name="learner", count=learner.workers, cpus=1, gpus=learner.gpus,
            memory=_PROCESS + own * weights + kept,
        ),
    )  # fmt: skip


def refusals_of(config: Config, sizes: Sizes, machine: Machine, found: CapacityPlan) -> list[str]:
    """One sentence for each thing that cannot work: value, bound, remedy."""
    said: list[str] = []
    learner, rollout = config.learner, config.rollout
    longest = sizes.prompt_tokens_max + len(sizes.nodes_per_level)
    if longest > sizes.longest:
        said.append(
            f"a prompt and its item take up to {longest} tokens, the policy knows {sizes.longest} "
            f"positions; lower data.max_history = {config.data.max_history}"
        )
    if learner.workers > learner.prompts_per_step:
        said.append(
            f"learner.workers = {learner.workers} cannot share learner.prompts_per_step = "
            f"{learner.prompts_per_step}; lower the one or raise the other"
        )
    if found.disk > machine.free_disk:
        said.append(
            f"checkpoints and policies take {found.disk / GIB:.1f} GiB, {config.output} has "
            f"{machine.free_disk / GIB:.1f} free; lower checkpoint.keep or set output elsewhere"
        )
    if address_of(config.cluster) is not None:
        return said  # what a cluster elsewhere has, this machine does not tell
    needed = cpus_needed(config)
    if config.cluster.cpus is not None and config.cluster.cpus < needed:
        said.append(
            f"cluster.cpus = {config.cluster.cpus} is below the {needed} that the actors ask for; "
            "raise it or leave it out"
        )
    gpus = rollout.gpus * rollout.actors + learner.gpus * learner.workers
    if gpus > machine.gpus:
        said.append(
            f"rollout.gpus and learner.gpus ask for {gpus:g} GPUs, this machine has "
            f"{machine.gpus}; lower them or set cluster.address"
        )
    system = sum(room.count * room.memory for room in found.groups if not room.gpus)
    if system > machine.memory:
        said.append(
            f"the rooms take {system / GIB:.1f} GiB, this machine has {machine.memory / GIB:.1f}; "
            "lower rollout.kv_cache_gib, learner.max_tokens, or the number of actors"
        )
    return said


def sizes_of(run: Run) -> Sizes:
    """Of the run's policy, whose weights are not read, and of its data."""
    policy = skeleton(run)
    hidden = int(policy.config.hidden_size)
    count = np.diff(make_prompts(run.tokenizer, run.train, np.arange(len(run.train))).token_start)
    trie = run.catalog.trie
    depth = trie.path(trie.leaf_node)
    nodes = [int(torch.unique(column[column >= 0]).numel()) for column in depth.T]
    return Sizes(
        parameters=sum(p.numel() for p in policy.parameters()),
        hidden=hidden,
        inner=int(getattr(policy.config, "intermediate_size", 4 * hidden)),
        layers=int(policy.config.num_hidden_layers),
        longest=int(getattr(policy.config, "max_position_embeddings", 1 << 30)),
        train_rows=len(run.train),
        prompt_tokens=float(count.mean()),
        prompt_tokens_max=int(count.max()),
        nodes_per_level=tuple(nodes),
    )


def skeleton(run: Run) -> PreTrainedModel:
    """The policy without storage for its weights."""
    with torch.device("meta"):
        if (folder := run.base or run.policy).is_dir():
            known = AutoConfig.from_pretrained(folder)
            if run.base is not None:
                known.vocab_size = run.tokenizer.size
            made = cast(PreTrainedModel, AutoModelForCausalLM.from_config(known))
        else:
            made = model.create(run.config.model, run.tokenizer, seed=0)
        if run.config.model.value_head:
            made.add_module(value_head.NAME, value_head.ValueHead(int(made.config.hidden_size)))
    return made


def machine_of(output: Path) -> Machine:
    """This machine."""
    there = output.resolve()
    while not there.exists():
        there = there.parent
    return Machine(
        cpus=len(psutil.Process().cpu_affinity() or []) or (psutil.cpu_count() or 1),
        memory=psutil.virtual_memory().total,
        gpus=torch.cuda.device_count(),
        free_disk=shutil.disk_usage(there).free,
    )


def calibrate(run: Run, sizes: Sizes, *, seconds: float = 2.0) -> Speed:
    """Tokens per second of a forward pass, and of one with its backward pass, on this CPU."""
    policy = skeleton(run).to_empty(device="cpu")
    with torch.no_grad():
        for weight in policy.parameters():
            weight.normal_(0.0, 0.02)
        for buffer in policy.buffers():
            buffer.fill_(1.0)
    rows = max(1, min(run.config.rollout.batch_size, len(run.train)))
    token = torch.zeros(rows, max(2, round(sizes.prompt_tokens)), dtype=torch.long)

    def forward() -> None:
        with torch.inference_mode():
            policy.base_model(input_ids=token, use_cache=False)

    def update() -> None:
        output = policy.base_model(input_ids=token, use_cache=False)
        output.last_hidden_state.square().mean().backward()

    return Speed(
        forward=token.numel() / _pace(forward, seconds / 2),
        update=token.numel() / _pace(update, seconds / 2),
    )


def _pace(call: Callable[[], None], seconds: float) -> float:
    """Median seconds of a call, after a first one, within a time."""
    call()
    end, times = time.perf_counter() + seconds, list[float]()
    while not times or time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return float(np.median(times))
