"""Plan the capacity that a run needs and find settings that cannot work; starts nothing.

Memory counts weights, optimizer state, caches and one Python process each; activations are
estimated. Seconds are extrapolated from a short calibration, and are an estimate.
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

from cluster.actors.session import cpus_needed, runs_elsewhere
from cluster.training.run import Run
from orchard.data.prompts import make_prompts
from orchard.policy import model, value_head
from orchard.policy.attention import position_limit
from orchard.settings import Config
from orchard.settings.widths import of_levels
from rollout.engine.registry import ENGINES

GIB = 1 << 30
_PROCESS = int(0.55 * GIB)
"""Bytes of a Python process with torch, Ray and transformers loaded, measured on Linux."""
_ADAM = 2
"""Number of Adam moments per weight, in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of the policy and the data that determine memory and time."""

    parameters: int
    """Number of parameters of the policy."""
    hidden: int
    """Width of the hidden states."""
    inner: int
    """Width of the MLP."""
    layers: int
    """Number of transformer layers."""
    longest: int
    """Maximum number of positions of the policy."""
    prompt_tokens: float
    """Mean tokens per prompt."""
    prompt_tokens_max: int
    """Maximum tokens per prompt."""
    nodes_per_level: tuple[int, ...]
    """Number of trie nodes at each level of the catalog."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Resources of this machine."""

    memory: int
    """Bytes of system memory."""
    gpus: int
    free_disk: int
    """Free bytes on the disk of the run folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessGroup:
    """Processes of one kind."""

    name: str
    count: int
    cpus: int
    """Logical CPUs per process."""
    gpus: float
    """GPUs per process."""
    memory: int
    """Bytes per process, in system memory or on its GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Calibrated tokens per second of one process."""

    forward: float
    """Tokens per second of a forward pass."""
    update: float
    """Tokens per second of a forward and a backward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityPlan:
    """Process layout, cost of a step, and the reasons why the run cannot work, if any."""

    groups: tuple[ProcessGroup, ...]
    disk: int
    """Bytes of checkpoints and policies."""
    prefill_tokens: float
    """Prompt tokens per step."""
    search_tokens: float
    """Search tokens per step: upper bound for a beam, without forced codes."""
    update_tokens: float
    """Tokens per update."""
    search_s: float
    """Seconds of search per step."""
    update_s: float
    """Seconds of updates per step."""
    refusals: tuple[str, ...]
    """One sentence for each setting that cannot work."""

    @property
    def memory(self) -> int:
        """Bytes of all processes."""
        return sum(group.count * group.memory for group in self.groups)


def plan(config: Config, sizes: Sizes, machine: Machine, speed: Speed) -> CapacityPlan:
    """Plan the training phase of a run."""
    learner, rollout = config.learner, config.rollout
    groups = layout(config, sizes)
    weights = 4 * sizes.parameters
    saved = weights * (1 + _ADAM + bool(learner.ema_decay)) * config.checkpoint.keep
    widths = of_levels(rollout.beam_width, len(sizes.nodes_per_level), "rollout.width")
    inner = zip(widths[:-1], sizes.nodes_per_level[:-1], strict=True)
    expanded = sum(min(width, nodes) for width, nodes in inner)
    leaves = min(rollout.group_size, sizes.nodes_per_level[-1])
    prefill = learner.prompts_per_step * sizes.prompt_tokens
    search = float(learner.prompts_per_step * expanded)
    update = prefill + search + learner.prompts_per_step * leaves
    capacity = CapacityPlan(
        groups=groups,
        disk=saved + 3 * weights,  # scratch or warm start, best checkpoint, and the result
        prefill_tokens=prefill,
        search_tokens=search,
        update_tokens=update,
        search_s=(prefill + search) / speed.forward / rollout.actors,
        update_s=learner.updates_per_batch * update / speed.update / learner.workers,
        refusals=(),
    )
    return replace(capacity, refusals=tuple(refusals_of(config, sizes, machine, capacity)))


def layout(config: Config, sizes: Sizes) -> tuple[ProcessGroup, ...]:
    """Return the process groups of the training phase, with the resources of one process."""
    learner, rollout = config.learner, config.rollout
    weights = 4 * sizes.parameters
    copies = 2 + _ADAM + bool(config.learner.kl.weight) + bool(learner.ema_decay)  # with gradients
    held_copies = copies if learner.parallel == "ddp" else -(-copies // learner.workers) + 1
    # Copied for a checkpoint while it is written, without the reference and the gradients.
    held_copies += 1 + _ADAM + bool(learner.ema_decay)
    # Kept for the backward pass: about eight states and three inner states of a token per layer.
    activations = 4 * learner.max_tokens * sizes.layers * (8 * sizes.hidden + 3 * sizes.inner)
    engine_weights = sizes.parameters * (4 if rollout.dtype == "float32" else 2)
    kv_bytes = 4 * 2 * sizes.layers * sizes.hidden  # bytes of keys and values per token, at most
    branches = sum(of_levels(rollout.beam_width, len(sizes.nodes_per_level), "rollout.width"))
    slots = sizes.prompt_tokens_max + branches

    def engine(name: str) -> int:
        """Return the bytes of an actor with an engine."""
        cache = int(rollout.batch_size * slots * kv_bytes)
        if ENGINES.facts(name).own_process:
            cache = int(rollout.kv_cache_gib * GIB) + _PROCESS  # the engine is a separate process
        return _PROCESS + engine_weights + cache

    return (
        ProcessGroup(
            name="driver", count=1, cpus=2, gpus=0.0, memory=_PROCESS + 2 * weights
        ),
        ProcessGroup(
            name="rollout", count=rollout.actors, cpus=1, gpus=rollout.gpus,
            memory=engine(rollout.engine),
        ),
        # The rollout actors evaluate where they can; else one more actor does.
        ProcessGroup(
            name="ranking", count=int(not config.rollouts_evaluate), cpus=1, gpus=rollout.gpus,
            memory=engine(config.evaluate.engine),
        ),
        ProcessGroup(
            name="rewards", count=config.rewards.actors, cpus=1, gpus=0.0, memory=_PROCESS,
        ),
        ProcessGroup(
            name="learner", count=learner.workers, cpus=1, gpus=learner.gpus,
            memory=_PROCESS + held_copies * weights + activations,
        ),
    )  # fmt: skip


def refusals_of(
    config: Config, sizes: Sizes, machine: Machine, capacity: CapacityPlan
) -> list[str]:
    """Return one sentence (value, bound, remedy) for each setting that cannot work."""
    refusals: list[str] = []
    learner = config.learner
    longest = sizes.prompt_tokens_max + len(sizes.nodes_per_level)
    if longest > sizes.longest:
        refusals.append(
            f"a prompt and its item take up to {longest} tokens, the policy knows {sizes.longest} "
            f"positions; lower data.max_history = {config.data.max_history}"
        )
    if learner.workers > learner.prompts_per_step:
        refusals.append(
            f"learner.workers = {learner.workers} cannot share learner.prompts_per_step = "
            f"{learner.prompts_per_step}; lower the one or raise the other"
        )
    if capacity.disk > machine.free_disk:
        refusals.append(
            f"checkpoints and policies take {capacity.disk / GIB:.1f} GiB, {config.output} has "
            f"{machine.free_disk / GIB:.1f} free; lower checkpoint.keep or set output elsewhere"
        )
    if runs_elsewhere(config.cluster):
        return refusals  # the resources of a remote cluster are unknown here
    needed = cpus_needed(config)
    if config.cluster.cpus is not None and config.cluster.cpus < needed:
        refusals.append(
            f"cluster.cpus = {config.cluster.cpus} is below the {needed} that the actors ask for; "
            "raise it or leave it out"
        )
    gpus = sum(group.count * group.gpus for group in capacity.groups)
    if config.cluster.in_process:  # all share one
        gpus = min(gpus, 1.0)
    if gpus > machine.gpus:
        refusals.append(
            f"rollout.gpus and learner.gpus ask for {gpus:g} GPUs with the actor that evaluates, "
            f"this machine has {machine.gpus}; lower them or set cluster.address"
        )
    system = sum(group.count * group.memory for group in capacity.groups if not group.gpus)
    if system > machine.memory:
        refusals.append(
            f"the processes take {system / GIB:.1f} GiB, this machine has "
            f"{machine.memory / GIB:.1f}; lower rollout.kv_cache_gib, learner.max_tokens, or the "
            "number of actors"
        )
    return refusals


def sizes_of(run: Run) -> Sizes:
    """Measure the run's policy, without reading its weights, and its data."""
    policy = skeleton(run)
    text = policy.config.get_text_config()
    hidden = int(text.hidden_size)
    count = np.diff(make_prompts(run.tokenizer, run.rows, np.arange(len(run.rows))).token_start)
    trie = run.catalog.trie
    path = trie.path(trie.leaf_node)  # node of each leaf at each level, -1 past its end
    nodes = [int(torch.unique(column[column >= 0]).numel()) for column in path.T]
    return Sizes(
        parameters=sum(p.numel() for p in policy.parameters()),
        hidden=hidden,
        inner=int(getattr(text, "intermediate_size", 4 * hidden)),
        layers=int(text.num_hidden_layers),
        longest=position_limit(policy.config),
        prompt_tokens=float(count.mean()),
        prompt_tokens_max=int(count.max()),
        nodes_per_level=tuple(nodes),
    )


def skeleton(run: Run) -> PreTrainedModel:
    """Build the policy on the meta device, without storage for its weights."""
    with torch.device("meta"):
        if (folder := run.base or run.policy).is_dir():
            model_config = AutoConfig.from_pretrained(folder)
            if run.base is not None:
                model_config.vocab_size = run.tokenizer.size
            policy = cast(PreTrainedModel, AutoModelForCausalLM.from_config(model_config))
        else:
            policy = model.create(run.config.model, run.tokenizer, seed=0)
        if run.config.model.value_head:
            policy.add_module(value_head.NAME, value_head.ValueHead(int(policy.config.hidden_size)))
    return policy


def machine_of(output: Path) -> Machine:
    """Return the resources of this machine."""
    folder = output.resolve()
    while not folder.exists():
        folder = folder.parent
    return Machine(
        memory=psutil.virtual_memory().total,
        gpus=torch.cuda.device_count(),
        free_disk=shutil.disk_usage(folder).free,
    )


def calibrate(run: Run, sizes: Sizes, *, seconds: float = 2.0) -> Speed:
    """Measure the tokens per second of forward and of forward and backward passes on this CPU."""
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
        forward=token.numel() / _median_seconds(forward, seconds / 2),
        update=token.numel() / _median_seconds(update, seconds / 2),
    )


def _median_seconds(call: Callable[[], None], seconds: float) -> float:
    """Return the median duration of a call, repeated for some seconds after a warm-up call."""
    call()
    end, times = time.perf_counter() + seconds, list[float]()
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times))
